"""What the rotary module of a wrapped model turns a batch's rows by.

Flows in: tensors. Flows out: `RowTables`, on the device without a wait. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e2llm.hf.rotary import LayerType


@dataclass(frozen=True)
class RowTables:
    """Tables of a batch's rows; plain attributes, never buffers: DDP would overwrite every rank's with rank 0's."""

    inv_freq: dict[LayerType, torch.Tensor]
    """(B or 1, 1, D/2) float32 for each scaled layer type; (B or 1, T, D/2) where every token has its own."""
    attention_scale: dict[LayerType, torch.Tensor]
    """(B or 1, 1, 1) float32; (B or 1, T, 1) where every token has its own."""
    positions: torch.Tensor | None
    """(B, R) int64: where position id m of row b stands; None leaves ids as they are."""
    by_place: bool = False
    """Whether `positions` is instead (B, T), where token t of row b stands: several documents share a row."""
    far: tuple[torch.Tensor, torch.Tensor] | None = None
    """Channels that make keys of earlier segments count for more (`hf.far_tables`); None: every key counts once."""

    def copy_(self, other: RowTables) -> None:
        """Take over the values of `other`, of the same shapes: what a recorded graph reads stays where it is."""
        for mine, its in ((self.inv_freq, other.inv_freq), (self.attention_scale, other.attention_scale)):
            for layer_type, table in mine.items():
                table.copy_(its[layer_type])


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. From pinned memory, so that the host does not wait for what the device still computes."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
