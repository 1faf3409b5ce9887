"""The module that stands in for a model's rotary module: tables of each row's own scale and positions.

Flows in: the original module, what its layers' embeddings are, and the rows that an `Extension` sets. Flows out: cos
and sin in the model's own form. With nothing set it is the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from e2llm.hf.rotary import LAYOUTS, LayerType, call_rotary
from e2llm.hf.row_tables import RowTables
from e2llm.positions.rope import Rope

if TYPE_CHECKING:
    from e2llm.hf.extension import Extension

# B = batch, T = tokens


class ScaledRotary(nn.Module):
    """Stands in for a model's rotary module. With nothing set it calls the original and returns its answer."""

    def __init__(self, inner: nn.Module, ropes: dict[LayerType, Rope], layouts: dict[LayerType, tuple[str, bool]]):
        super().__init__()
        self.inner = inner
        self.ropes = ropes
        self.layouts = layouts
        self.rows: RowTables | None = None
        self.extension: Extension

    def __getattr__(self, name: str) -> Any:
        # A model may read its rotary module's own attributes (rope_type, inv_freq, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: LayerType = None) -> Any:
        """cos, sin (or the model's own form) for x's rows; position_ids (B or 1, T) int64 as the model counts them."""
        if self.rows is None or layer_type not in self.ropes:
            return call_rotary(self.inner, x, position_ids, layer_type)
        with torch.no_grad():
            return self._tables(self.rows, x, position_ids, layer_type)

    def _tables(self, rows: RowTables, x: torch.Tensor, position_ids: torch.Tensor, layer_type: LayerType) -> Any:
        if position_ids.dim() == 3:  # multimodal sections (time, height, width): text has the same id in each
            position_ids = position_ids[0]
        if self.extension.method == "dynamic_ntk":
            rows = self.extension.rows_of_length(int(position_ids.max()) + 1)
        inv_freq = rows.inv_freq[layer_type].to(x.device)
        scale = rows.attention_scale[layer_type].to(x.device)
        batch = inv_freq.shape[0]
        if batch > 1 and batch != x.shape[0]:
            raise ValueError(
                f"scales are set for {batch} rows, the batch has {x.shape[0]}: set one scale, or one for each row"
            )
        if rows.positions is not None and rows.by_place:
            position_ids = rows.positions.to(x.device)
        elif rows.positions is not None:
            position_ids = self._placed(rows.positions.to(x.device), position_ids, x.shape[0])
        angles = position_ids[..., None].float() * inv_freq
        layout, takes_dtype = self.layouts[layer_type]
        tables = LAYOUTS[layout](angles, scale)
        return tuple(t.to(x.dtype) for t in tables) if takes_dtype else tables

    @staticmethod
    def _placed(positions: torch.Tensor, position_ids: torch.Tensor, batch: int) -> torch.Tensor:
        if positions.shape[0] != batch:
            raise ValueError(f"placements are set for {positions.shape[0]} rows, the batch has {batch}")
        if position_ids.shape[-1] > positions.shape[1]:
            raise ValueError(
                f"the batch has {position_ids.shape[-1]} tokens, its placements were drawn for {positions.shape[1]}"
            )
        return positions.gather(1, position_ids.expand(batch, -1))
