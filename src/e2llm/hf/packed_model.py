"""A transformers causal LM that reads packed rows: set up once, checked against itself, then asked for logits.

Flows in: an extended model, then steps of pieces with their scales. Flows out: logits of the tokens that are asked
for. A model whose attention we would get wrong is refused when it is set up: its layers are watched in a forward pass,
and the logits of a probe, packed in pieces at two scales (where far keys stand in groups: with few near ones), must be
those of its own attention.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from transformers import AttentionInterface

from e2llm.hf.extension import Extension
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.paged import ATTENTION, Extras, LayerShape, attending, paged_attention
from e2llm.hf.paged_decode import BlockTables
from e2llm.hf.rotary import unwrap

# T = tokens of a step, V = vocabulary size

PROBE_TOKENS = 24
PROBE_NEIGHBOURS = 6
"""At most, where far keys stand in groups: few enough for most of the probe's keys to be far."""
_PROBE_TOLERANCE = {torch.float32: 2e-2, torch.float16: 0.05, torch.bfloat16: 0.15}
_CPU_TOLERANCE = 1e-4
"""Relative distance of the probe's logits. On a CPU float32 is exact to 1e-6; on a GPU it may be tf32. A missing
window, softcap or scale costs 0.2 and more."""
_REMEDY = "serve it with infer.Engine, one request at a time"


class PackedModel:
    """The handle on one model that attends over pages; `restore` gives it its own attention back."""

    def __init__(self, model: Any, extension: Extension, *, kernels: bool = False) -> None:
        """`kernels`: the probe's single tokens go through them. Raises ValueError, naming the model type, for a model
        that we would not read as it reads itself."""
        self.model, self.extension, self.kernels = model, extension, kernels
        self._inner = cast(Any, unwrap(model))
        self.device: torch.device = self._inner.device
        self.kind: str = self._inner.config.model_type
        self.vocabulary: int = self._inner.get_input_embeddings().num_embeddings
        if extension.switches_by_length:
            raise self._refusal(f"method {extension.method!r} switches its frequencies by length and reads one length")
        self._own_attention: str = self._inner.config._attn_implementation
        self._takes_places = "logits_to_keep" in inspect.signature(self._inner.forward).parameters
        self._own_scale = extension.scale
        try:
            with self._few_neighbours():
                probe, expected = self._own_logits()
                AttentionInterface.register(ATTENTION, paged_attention)
                self._inner.set_attn_implementation(ATTENTION)
                self.shapes = self._watch(probe[0])
                self._compare(probe, expected)
        except BaseException:
            self.restore()
            raise

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return sum(shape.token_bytes for shape in self.shapes.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of them that a later token reads: of a key that has a far key beside it, the one or the other."""
        return sum(s.kv_heads * (s.key_dim + s.value_dim) * s.dtype.itemsize for s in self.shapes.values())

    def restore(self) -> None:
        """The model's own attention again, at the scale it had."""
        self._inner.set_attn_implementation(self._own_attention)
        self.extension.set_scale(self._own_scale)

    def logits(
        self,
        step: PackedStep,
        token_ids: np.ndarray | torch.Tensor,
        scales: Sequence[float],
        token_scale: np.ndarray,
        places: Sequence[int],
    ) -> torch.Tensor:
        """(len(places), V) logits of the tokens at `places` of the row; every token's keys go to its pages.

        token_ids: (T,) int64. token_scale: (T,) int64, which of `scales` each token has.
        """
        ids = torch.as_tensor(token_ids).to(self.device, non_blocking=True)[None]
        which = torch.from_numpy(token_scale).to(self.device, non_blocking=True)
        kept = torch.tensor(list(places) or [0], device=self.device)  # a head over no rows is nothing to rely on
        extra = {"logits_to_keep": kept} if self._takes_places else {}
        with self.extension.packed(scales, which), attending(step):
            out = self.model(input_ids=ids, position_ids=step.position_ids, use_cache=False, **extra).logits[0]
        found: torch.Tensor = out if self._takes_places else out[kept]
        return found[: len(places)]

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"model type {self.kind!r}: {why}; {_REMEDY}")

    @torch.no_grad()
    def _own_logits(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Two probes (N,) and the logits (N, V) that the model's own attention gives them, at scales 1 and 2."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(self.vocabulary, (2, PROBE_TOKENS), generator=generator).to(self.device)
        expected = []
        for row, scale in zip(probe, self._probe_scales(), strict=True):
            self.extension.set_scale(scale)
            expected.append(self.model(input_ids=row[None], use_cache=False).logits[0].float())
        self.extension.set_scale(self._own_scale)
        return list(probe), expected

    @contextlib.contextmanager
    def _few_neighbours(self) -> Iterator[None]:
        """Within it, far keys are nearer than they are, so that a short probe has some."""
        own = self.extension.grouping
        if own is not None:
            self.extension.grouping = own._replace(neighbours=min(own.neighbours, PROBE_NEIGHBOURS))
        try:
            yield
        finally:
            self.extension.grouping = own
            self.extension.set_scale(self._own_scale)  # its tables know the neighbours

    def _probe_scales(self) -> tuple[float, float]:
        return 1.0, min(2.0, self.extension.rope.max_scale or 2.0)

    @torch.no_grad()
    def _watch(self, ids: torch.Tensor) -> dict[int, LayerShape]:
        """What every layer keeps, seen in one forward pass."""
        watcher = _Watcher(grouped=self.extension.grouping is not None)
        try:
            with self.extension.using(None), attending(watcher):
                self.model(input_ids=ids[None], use_cache=False)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise self._refusal(f"its attention cannot be paged ({error})") from error
        config = self._inner.config.get_text_config()
        layers = int(config.num_hidden_layers)
        if watcher.calls != layers or len(watcher.shapes) != layers:
            raise self._refusal(
                f"{watcher.calls} of its {layers} layers take their attention from transformers' interface"
            )
        if watcher.grouped and not watcher.plain:
            raise self._refusal("method = 'self_extend' with softcap or sinks is not served in batches")
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        for layer, shape in watcher.shapes.items():
            kind = types[layer] if types else ("sliding_attention" if window else "full_attention")
            if kind not in {"sliding_attention", "full_attention"}:
                raise self._refusal(f"layer {layer} attends by {kind!r}")
            if (kind == "sliding_attention") != (shape.sliding_window is not None):
                raise self._refusal(f"layer {layer} ({kind}) attends with sliding_window = {shape.sliding_window}")
        return watcher.shapes

    @torch.no_grad()
    def _compare(self, probe: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        """Read both probes in pieces of several lengths, interleaved, and compare every token's logits."""
        size = 4
        per_row = -(-PROBE_TOKENS // size)
        pages = KeyValuePages(self.shapes, 2 * per_row, size, self.device)
        tables = [np.arange(1, per_row + 1) + per_row * row for row in range(2)]
        on_device = BlockTables(2, per_row, self.device) if self.kernels else None
        for row, table in enumerate(tables if on_device is not None else []):
            on_device.set(row, table)  # type: ignore[union-attr]
        found: list[list[torch.Tensor]] = [[], []]
        grouping = self.extension.grouping
        cuts = [0, 7, 8, 17, PROBE_TOKENS]
        for start, end in pairwise(cuts):
            singles = np.arange(2 if end - start == 1 else 0)
            groups = [1 if grouping is None else grouping.group(scale) for scale in self._probe_scales()]
            pieces = [Piece(table, start, end - start, group) for table, group in zip(tables, groups, strict=True)]
            step = PackedStep(pages, pieces, on_device, singles, grouping)
            ids = torch.cat([row[start:end] for row in probe]).cpu().numpy()
            rows = np.repeat(np.arange(2), end - start)
            logits = self.logits(step, ids, self._probe_scales(), rows, range(2 * (end - start)))
            for row in range(2):
                found[row].append(logits.float()[rows == row])
        ours, own = torch.cat([torch.cat(pieces) for pieces in found]), torch.cat(expected)
        distance = (ours - own).norm(dim=-1) / own.norm(dim=-1)
        dtype = next(iter(self.shapes.values())).dtype
        # A router of low precision may send single tokens elsewhere; what is wrong is wrong everywhere.
        worst = float(distance.max() if dtype == torch.float32 else distance.median())
        exact = dtype == torch.float32 and self.device.type == "cpu"
        if not worst <= (_CPU_TOLERANCE if exact else _PROBE_TOLERANCE[dtype]):
            raise self._refusal(f"paged attention gives other logits than its own (relative distance {worst:.2g})")


class _Watcher:
    """Notes what every layer asks for; answers zeros."""

    def __init__(self, *, grouped: bool) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.calls = 0
        self.grouped, self.plain = grouped, True

    def attend(
        self,
        layer: int,
        window: int | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        self.calls += 1
        self.plain = self.plain and extras.plain
        far_dim = key.shape[-1] if self.grouped and window is None else 0
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1], key.dtype, window, far_dim)
        return value.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
