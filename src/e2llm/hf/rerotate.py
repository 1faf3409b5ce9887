"""Cached keys of one scale turned into keys of another, in one pass over their pages: approximate, and cheap.

A stored key is A · R(m θ) k for position m, frequencies θ and attention scale A of its scale. Turned by m (θ' - θ) and
multiplied by A' / A it is the key that the other scale writes for the same k. In the first layer that is exact. In
deeper ones k itself would differ, because what it was made from attended at the old scale; values likewise. Reading
again is exact and is the default everywhere; how far this is from it, `e2llm benchmark rerotate` measures.

Flows in: pages and two scales. Flows out: other pages. Which channels of a key a model turns, and in which pairs, is
found out by asking it: keys of two scales from the same hidden states are compared, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from e2llm.hf.packed import KeyValuePages
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.paged import Extras, attending
from e2llm.hf.paged_decode import device_of, tile_side
from e2llm.hf.rotary import LayerType

# P = pages, S = tokens of a page, G = key-value heads, D = rotary_dim, T = tokens

PROBE_SCALES = (1.0, 2.0)
PROBE_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative distance of turned keys from those that the model makes; a wrong pairing is off by 0.1 and more."""


@dataclass(frozen=True)
class Pairing:
    """Which channels of a layer's key turn together."""

    layer_type: LayerType
    """Whose frequencies."""
    first: int
    """First rotated channel."""
    pairs: int
    interleaved: bool
    """Channel 2j with 2j + 1, else j with j + `pairs`."""

    def turned(self, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """key (…, key dim) with cos, sin (…, pairs) float32; what is not rotated stays."""
        end = self.first + 2 * self.pairs
        rotated = key[..., self.first : end].float()
        if self.interleaved:
            x, y = rotated[..., ::2], rotated[..., 1::2]
            found = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
        else:
            x, y = rotated.split(self.pairs, dim=-1)
            found = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
        return torch.cat((key[..., : self.first], found.to(key.dtype), key[..., end:]), dim=-1)


class Rerotation:
    """Turns cached pages of one engine. Raises ValueError for a model whose keys it cannot turn."""

    def __init__(self, packed: PackedModel, store: KeyValuePages) -> None:
        if packed.extension.grouping is not None:
            raise ValueError(
                "method = 'self_extend': cached keys are not turned from one scale's groups to another's; leave "
                "rerotate out: a conversation that outgrows its scale is then read again"
            )
        self.packed, self.store = packed, store
        self.pairings = find_pairings(packed)

    def turn(self, sources: np.ndarray, targets: np.ndarray, first_position: int, old: float, new: float) -> None:
        """Fill pages `targets` (P,) with what `sources` (P,) hold at scale `old`, as of scale `new`; the first one's
        first token is at `first_position`. Queued; one launch a layer on CUDA."""
        device = self.packed.device
        source, target = (torch.from_numpy(np.ascontiguousarray(pages)).to(device) for pages in (sources, targets))
        tables = {p.layer_type: self._tables(p.layer_type, old, new) for p in self.pairings.values() if p is not None}
        for layer, pairing in self.pairings.items():
            if pairing is None:
                self.store.layers[layer][target] = self.store.layers[layer][source]
            elif self.packed.kernels:
                self._by_kernel(layer, pairing, source, target, first_position, tables[pairing.layer_type])
            else:
                self._plainly(layer, pairing, source, target, first_position, tables[pairing.layer_type])

    def _tables(self, layer_type: LayerType, old: float, new: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        before, after = (self.packed.extension.serving_frequencies(layer_type, scale) for scale in (old, new))
        ratio = after.attention_scale / before.attention_scale
        return before.inv_freq.to(self.packed.device), after.inv_freq.to(self.packed.device), ratio

    def _plainly(
        self,
        layer: int,
        pairing: Pairing,
        source: torch.Tensor,
        target: torch.Tensor,
        first_position: int,
        tables: tuple[torch.Tensor, torch.Tensor, float],
    ) -> None:
        store, size = self.store.layers[layer], self.store.page_tokens
        positions = torch.arange(first_position, first_position + len(source) * size, device=store.device)
        cos, sin = _cos_sin(positions, *tables)
        kept = store[source]
        shape = (len(source), size, 1, pairing.pairs)
        store[target] = pairing.turned(kept, cos.view(shape), sin.view(shape))

    def _by_kernel(
        self,
        layer: int,
        pairing: Pairing,
        source: torch.Tensor,
        target: torch.Tensor,
        first_position: int,
        tables: tuple[torch.Tensor, torch.Tensor, float],
    ) -> None:
        from e2llm.hf import paged_kernels as kernels

        store, shape = self.store.layers[layer], self.store.shapes[layer]
        old, new, ratio = tables
        with device_of(store):
            kernels.turn_pages[(len(source), self.store.page_tokens)](
                *(store, source, target, old, new, ratio, first_position),
                *store.stride()[:3],
                G=shape.kv_heads,
                S=self.store.page_tokens,
                WIDTH=shape.key_dim + shape.value_dim,
                PAIRS=pairing.pairs,
                FIRST=pairing.first,
                INTERLEAVED=pairing.interleaved,
                HEADS_BLOCK=tile_side(shape.kv_heads, 1),
                PAIRS_BLOCK=tile_side(pairing.pairs, 1),
                WIDTH_BLOCK=tile_side(shape.key_dim + shape.value_dim, 1),
                enable_fp_fusion=False,  # both angles are rounded, as the model's tables are
            )


def _cos_sin(
    positions: torch.Tensor, old: torch.Tensor, new: torch.Tensor, ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, pairs) float32. Both angles are rounded as the model's own tables are, so that their difference is that of
    the tables."""
    spots = positions[:, None].float()
    angle = spots * new - spots * old
    return angle.cos() * ratio, angle.sin() * ratio


@torch.no_grad()
def find_pairings(packed: PackedModel) -> dict[int, Pairing | None]:
    """How each layer turns its keys; None for one that does not, or at every scale alike (local layers).

    Raises ValueError for a layer whose keys of one scale do not become those of another.
    """
    first, second = (_keys_at(packed, scale) for scale in PROBE_SCALES)
    return {layer: _pairing_of(packed, layer, first[layer], second[layer]) for layer in packed.shapes}


def _pairing_of(packed: PackedModel, layer: int, first: torch.Tensor, second: torch.Tensor) -> Pairing | None:
    """From keys (G, T, key dim) of one layer at both probe scales."""
    tolerance = _TOLERANCE[first.dtype]
    if _distance(first, second) < tolerance / 10:
        return None
    positions = torch.tensor(PROBE_POSITIONS, device=first.device)
    for layer_type in packed.extension.layer_types:
        before, after = (packed.extension.serving_frequencies(layer_type, scale) for scale in PROBE_SCALES)
        pairs = len(before.inv_freq)
        ratio = after.attention_scale / before.attention_scale
        tables = _cos_sin(positions, before.inv_freq.to(first.device), after.inv_freq.to(first.device), ratio)
        for start in sorted({0, first.shape[-1] - 2 * pairs}):
            for interleaved in (False, True):
                pairing = Pairing(layer_type, start, pairs, interleaved)
                if start >= 0 and _distance(pairing.turned(first, *tables), second) < tolerance:
                    return pairing
    raise ValueError(
        f"model type {packed.kind!r}: cached keys of layer {layer} cannot be turned to another scale; leave rerotate "
        "out: a conversation that outgrows its scale is then read again"
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _keys_at(packed: PackedModel, scale: float) -> dict[int, torch.Tensor]:
    """Keys (G, T, key dim) of every layer at the probe's positions, from hidden states that no attention has touched:
    the same ones at every scale."""
    keeper = _Keeper()
    generator = torch.Generator().manual_seed(0)
    count = len(PROBE_POSITIONS)
    ids = torch.randint(packed.vocabulary, (1, count), generator=generator).to(packed.device)
    positions = torch.tensor([PROBE_POSITIONS], device=packed.device)
    which = torch.zeros(count, dtype=torch.int64, device=packed.device)
    with packed.extension.packed((scale,), which), attending(keeper):
        packed.model(input_ids=ids, position_ids=positions, use_cache=False)
    return keeper.keys


class _Keeper:
    """Keeps every layer's key; answers zeros."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        window: int | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        self.keys[layer] = key.clone()
        return value.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
