"""Wraps the rotary module of one model instance so that each row of a batch has its own scale and positions.

Flows in: a transformers model, a frequency method. Flows out: an `Extension`, the handle through which training places
windows and inference sets scales. The positions given to the model stay 0, 1, 2, ...; the classes stay untouched;
`remove()` puts the original module back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from e2llm.hf.documents import document_lengths
from e2llm.hf.far_tables import FarTables, far_tables
from e2llm.hf.group_tables import (
    GROUP_TABLES,
    Grouping,
    GroupTables,
    PlacedGroups,
    documents_of,
    group_tables,
    placed_groups,
)
from e2llm.hf.rotary import LayerType
from e2llm.hf.row_tables import RowTables, sent
from e2llm.hf.scaled_rotary import ScaledRotary
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import Schedule
from e2llm.positions.frequencies import Frequencies, frequencies
from e2llm.positions.placement import Placement, PositionSampler
from e2llm.positions.rope import Rope

# B = batch, T = tokens, R = tokens in a training window, D = rotary_dim

FAR_TABLES = "far_tables"
"""Argument of the base model's forward that its layers hand on to their attention (`hf.far_attention`)."""


class Extension:
    """Handle on one wrapped model: what it is, which scale it has, how training draws."""

    def __init__(
        self, owner: nn.Module, wrapper: ScaledRotary, method: str, native_window: int, attention: AttentionConfig
    ) -> None:
        self.method = method
        """Frequency method, a key of `positions.frequencies.METHODS`."""
        self.attention = attention
        """Attention scale while training and when serving."""
        self.native_window = native_window
        """L in tokens."""
        self.sampler: PositionSampler | None = None
        """Draws placements while the model is in training mode; None: training sees the scale that is set."""
        self.max_scale: float = 1.0
        """Largest scale that training drew (1 where it is not known)."""
        self.schedule: Schedule = ()
        """Calibrated scale for each window; () is the ladder."""
        self.attends_far = False
        """Whether the model's attention knows `far_tables` (`hf.far_attention`)."""
        self.grouping: Grouping | None = None
        """Method `self_extend`: how far keys stand in groups; None with any other: each key at its own place."""
        self._groups: GroupTables | PlacedGroups | None = None
        self._inference_groups: GroupTables | None = None
        self.own_attention: str | None = None
        """The attention that method `self_extend` took the place of, which `remove` puts back."""
        self._scale: float | tuple[float, ...] | None = None
        self._inference_rows: RowTables | None = None
        self._packed: tuple[tuple[float, ...], RowTables] | None = None
        self._drawn = self._using = False
        self._pending: list[int] | None = None
        self._next_sample = 0
        self._cache: dict[tuple[LayerType, float, float | None], Frequencies] = {}
        self._owner = weakref.ref(owner)
        self._wrapper = wrapper
        wrapper.extension = self
        self._hook = owner.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        # Copied and pickled with the model: a weak reference would go on naming the original.
        return vars(self) | {"_owner": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_owner": weakref.ref(state["_owner"])})

    @property
    def rope(self) -> Rope:
        """The rotary embedding that is scaled (of the layers with full attention, where a model has several)."""
        return next(iter(self._wrapper.ropes.values()))

    @property
    def neighbours(self) -> int:
        """Method `self_extend`: tokens that keep their distance; 0 with any other."""
        return 0 if self.grouping is None else self.grouping.neighbours

    @property
    def scale(self) -> float | tuple[float, ...] | None:
        """The scale set for inference: one, one a row, or None (the model as it was)."""
        return self._scale

    def __repr__(self) -> str:
        types = [t for t in self._wrapper.ropes if t is not None]
        layers = f", layers={'+'.join(types)}" if types else ""
        return f"Extension(method={self.method!r}, native_window={self.native_window}, scale={self._scale}{layers})"

    def set_scale(self, scale: float | Sequence[float] | None) -> None:
        """Scale of the forwards to come: one ratio >= 1 for all rows, one for each row, None for the model as it was.

        Scale 1 for all rows is the model as it was, bit for bit; a LongRoPE base inside its native window (beyond it
        None switches to the long factors, scale 1 keeps the short ones). Method `none` is the model as it was at any
        scale, its own switching by length included. Raises ValueError for a scale below 1 and for what is no number.
        """
        found = None if scale is None else _scales(scale)
        values = (1.0,) if found is None else found if isinstance(found, tuple) else (found,)
        for value in values:  # raises for what cannot be, also where the answer is the null plan
            self._frequencies(next(iter(self._wrapper.ropes)), value)
        self._scale = found
        null = self.method == "none" or (self.method != "longrope" and all(value == 1.0 for value in values))
        self._inference_rows = None if found is None or null else self._rows(values, self.attention.serving())
        self._inference_groups = None
        if self.grouping is not None and not null:
            self._inference_groups = group_tables(values, self.grouping, _device(self._wrapper.inner))
        self._wrapper.rows, self._groups = self._inference_rows, self._inference_groups
        self._drawn = False

    def expect(self, sample_indices: Sequence[int]) -> None:
        """Name the samples of the next training batch, row by row, so that the draw is theirs whatever ran before."""
        self._pending = [int(index) for index in sample_indices]

    def start_at(self, sample_index: int) -> None:
        """Go on drawing from sample `sample_index` (>= 0), for trainers that resume."""
        if sample_index < 0:
            raise ValueError(f"sample_index = {sample_index}: use 0 or more")
        self._next_sample = int(sample_index)

    def place(self, placements: Sequence[Placement]) -> None:
        """Positions and scale of each row of the forwards to come, until `set_scale`. One length for all placements."""
        self._check_places()
        lengths = {len(p.positions) for p in placements}
        if len(lengths) != 1:
            raise ValueError(f"placements of one batch need one length, got {sorted(lengths)}")
        positions = torch.from_numpy(np.stack([p.positions for p in placements]))
        rows = self._rows(tuple(p.scale for p in placements), self.attention.training_slope, positions)
        if self.grouping is None:
            self._wrapper.rows = dataclasses.replace(rows, far=self._far([[p] for p in placements]))
        else:  # its attention weighs far keys itself
            self._wrapper.rows = rows
            self._groups = placed_groups(placements, self.grouping, _device(self._wrapper.inner))
        self._drawn = False

    def _far(self, rows: Sequence[Sequence[Placement]]) -> FarTables | None:
        """Tables of rows with one placement each or one a document; None where every key counts once."""
        if all(p.far is None for row in rows for p in row):
            return None
        if not self.attends_far:
            raise ValueError(
                "placement.far_weight: the model's attention does not know it yet; call hf.attend_far(model) first"
            )
        found = [[p.far for p in row if p.far is not None] for row in rows]
        if [len(row) for row in found] != [len(row) for row in rows]:
            raise ValueError("placements of one batch need one far_weight: some weigh far keys, some do not")
        return far_tables(found, _device(self._wrapper.inner))

    def _check_places(self) -> None:
        if self.method == "dynamic_ntk":
            raise ValueError("method = 'dynamic_ntk': its scale follows the length read; train with 'ntk' or another")

    @contextlib.contextmanager
    def packed(self, scales: Sequence[float], token_scale: torch.Tensor) -> Iterator[None]:
        """Within it, forwards are of batch 1, one row in which several requests stand: its token t has scale
        `scales[token_scale[t]]`.

        token_scale: (T,) int64 on the model's device. Every scale gets its table, 1 and method `none` too: a base that
        switches its frequencies by length would see the longest request of the row (`switches_by_length`).
        """
        with self.using(self.token_tables(scales, token_scale)):
            yield

    def token_tables(self, scales: Sequence[float], token_scale: torch.Tensor) -> RowTables:
        """Tables of one row's tokens, as `packed` uses them."""
        values = tuple(float(scale) for scale in scales)
        if self._packed is None or self._packed[0] != values:
            with torch.inference_mode(False), torch.no_grad():  # these tables outlive the caller's mode
                self._packed = values, self._rows(values, self.attention.serving())
        rows = self._packed[1]
        return RowTables(
            {t: table[token_scale, 0][None] for t, table in rows.inv_freq.items()},
            {t: table[token_scale, 0][None] for t, table in rows.attention_scale.items()},
            None,
        )

    @contextlib.contextmanager
    def using(self, tables: RowTables | None) -> Iterator[None]:
        """Within it, forwards turn by `tables`; None: the model as it was."""
        before = self._wrapper.rows, self._groups, self._using
        self._wrapper.rows, self._groups, self._using = tables, None, True
        try:
            yield
        finally:
            self._wrapper.rows, self._groups, self._using = before

    def rows_of_length(self, length: int) -> RowTables:
        """Tables of `dynamic_ntk` once `length` tokens are read: at length / L, and no more than the scale that is
        set."""
        most = max(self._scale) if isinstance(self._scale, tuple) else (self._scale or 1.0)
        return self._rows((min(max(1.0, length / self.native_window), most),), self.attention.serving())

    @property
    def switches_by_length(self) -> bool:
        """Whether the rotary embedding depends on the longest position of a batch: `dynamic_ntk`, and a base that does
        so itself under method `none`."""
        if self.method == "dynamic_ntk":
            return True
        kinds = {rope.rope_type for rope in self._wrapper.ropes.values()}
        return self.method == "none" and bool(kinds & {"dynamic", "longrope"})

    @property
    def layer_types(self) -> list[LayerType]:
        """Layer types that are scaled; [None] where there is one set of frequencies."""
        return list(self._wrapper.ropes)

    def serving_frequencies(self, layer_type: LayerType, scale: float) -> Frequencies:
        """What requests at `scale` turn by."""
        return self._frequencies(layer_type, scale, self.attention.serving())

    def remove(self) -> None:
        """Put the model's own rotary module back and drop the hook."""
        self._hook.remove()
        owner = self._owner()
        if owner is not None and owner.rotary_emb is self._wrapper:
            owner.rotary_emb = self._wrapper.inner
        if owner is not None and self.own_attention is not None:
            cast(Any, owner).set_attn_implementation(self.own_attention)

    def _frequencies(self, layer_type: LayerType, scale: float, slope: float | None = None) -> Frequencies:
        key = (layer_type, scale, slope)
        if key not in self._cache:
            if len(self._cache) > 4096:  # log-uniform draws never repeat
                self._cache.clear()
            self._cache[key] = frequencies(self._wrapper.ropes[layer_type], self.method, scale, slope)
        return self._cache[key]

    def _rows(self, scales: tuple[float, ...], slope: float | None, positions: torch.Tensor | None = None) -> RowTables:
        inv_freq, attention = {}, {}
        for layer_type in self._wrapper.ropes:
            found = [self._frequencies(layer_type, scale, slope) for scale in scales]
            device = _device(self._wrapper.inner)
            inv_freq[layer_type] = sent(torch.stack([f.inv_freq for f in found]), device)[:, None, :]
            attention_scales = torch.tensor([f.attention_scale for f in found], dtype=torch.float32)
            attention[layer_type] = sent(attention_scales, device)[:, None, None]
        if positions is not None:
            positions = sent(positions, _device(self._wrapper.inner))
        return RowTables(inv_freq, attention, positions)

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In training mode, draw this batch; in evaluation mode, put the scale that is set back. The forward gets the
        tables of far keys, where there are any."""
        # The argument's name depends on the version of transformers.
        if self.grouping is not None and any(getattr(x, "is_compileable", False) for x in (*args, *kwargs.values())):
            raise ValueError(
                "cache: of fixed length, whose empty places method self_extend would take for tokens; "
                'use one that grows (cache_implementation = "dynamic")'
            )
        self._draw(module, args, kwargs)
        groups = self._groups if self._drawn or self.grouping is None else self._of_documents(args, kwargs)
        if groups is not None:
            return args, {**kwargs, GROUP_TABLES: groups}
        rows = self._wrapper.rows
        return None if rows is None or rows.far is None else (args, {**kwargs, FAR_TABLES: rows.far})

    def _draw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and self.sampler is not None):
            if self._drawn:
                self._wrapper.rows, self._groups = self._inference_rows, self._inference_groups
                self._drawn = False
            return
        if getattr(module, "_is_replica", False):
            # A copy of the model has a copy of the tables too, made before this draw.
            raise ValueError(
                "model: torch's DataParallel splits each batch over the GPUs of one process, away from its scales and "
                "offsets; start a process for each GPU (torchrun --nproc-per-node GPUS SCRIPT), or let the script see "
                "one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        batch, window = _tokens(args, kwargs).shape[:2]
        lengths = document_lengths(kwargs.get("position_ids"), batch)
        if lengths is None:
            self.place([self.sampler.draw(index, window) for index in self._sample_indices(batch, blocks=True)])
        else:
            self._place_documents(lengths)
        self._drawn = True

    def _of_documents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GroupTables | PlacedGroups | None:
        """The tables of a forward that reads, and which documents it is to keep apart: those that begin position ids
        again, where no mask says what is padding, as transformers' own attentions have it."""
        tables, ids = self._groups, kwargs.get("position_ids")
        given = isinstance(tables, PlacedGroups) or self._using or kwargs.get("attention_mask") is not None
        if given or ids is None or ids.shape[-1] == 1:
            return tables
        lengths = document_lengths(ids, _tokens(args, kwargs).shape[0])
        if lengths is None:
            return tables
        assert self.grouping is not None
        device = _device(self._wrapper.inner)
        found = group_tables((1.0,), self.grouping, device) if not isinstance(tables, GroupTables) else tables
        return found._replace(documents=documents_of(lengths, device))

    def _sample_indices(self, count: int, *, blocks: bool) -> list[int]:
        """Indices of the next `count` samples: those that were named, else the next in order. The ranks take blocks of
        `count` in turn, or single indices where each has a count of its own."""
        if self._pending is not None:
            indices, self._pending = self._pending, None
            if len(indices) != count:
                raise ValueError(f"{len(indices)} sample indices were named for a batch of {count} samples")
            return indices
        rank, ranks = _rank()
        first, step = (self._next_sample + rank * count, 1) if blocks else (self._next_sample + rank, ranks)
        self._next_sample += ranks * count
        return [first + step * number for number in range(count)]

    def _place_documents(self, lengths: list[list[int]]) -> None:
        """A scale and positions for each document of rows in which several stand; `lengths` in tokens, row by row.

        A document too short for the placement keeps its own positions, at the scale that it drew.
        """
        assert self.sampler is not None
        self._check_places()
        flat = [length for row in lengths for length in row]
        indices = self._sample_indices(len(flat), blocks=False)
        draws = [self.sampler.draw_document(index, length) for index, length in zip(indices, flat, strict=True)]
        positions = np.concatenate([draw.positions for draw in draws]).reshape(len(lengths), -1)
        drawn = iter(draws)
        by_row = [list(itertools.islice(drawn, len(row))) for row in lengths]
        by_document = self._rows(tuple(draw.scale for draw in draws), self.attention.training_slope)
        owner = torch.from_numpy(np.repeat(np.arange(len(flat)), flat).reshape(positions.shape))
        owner = sent(owner, _device(self._wrapper.inner))
        self._wrapper.rows = RowTables(
            {t: table[owner, 0] for t, table in by_document.inv_freq.items()},
            {t: table[owner, 0] for t, table in by_document.attention_scale.items()},
            sent(torch.from_numpy(positions), _device(self._wrapper.inner)),
            by_place=True,
            far=self._far(by_row) if self.grouping is None else None,
        )
        if self.grouping is not None:  # its attention weighs far keys itself
            self._groups = placed_groups(draws, self.grouping, _device(self._wrapper.inner), lengths)


def _scales(scale: Any) -> float | tuple[float, ...]:
    """One float from a number of Python, numpy or torch, several from a sequence of them."""
    try:
        if isinstance(scale, Real) or getattr(scale, "ndim", None) == 0:
            return float(scale)
        values = tuple(float(value) for value in scale)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scale = {scale!r}: give a number, one number for each row, or None") from error
    if not values:
        raise ValueError("scale = []: give one number for each row, or None for the model as it was")
    return values


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Ids (B, T) or embeddings (B, T, D) that the base model is called with."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None, "a causal LM is called with input_ids or inputs_embeds"
    return cast(torch.Tensor, tokens)


def _device(module: nn.Module) -> torch.device:
    return next((b.device for b in module.buffers()), torch.device("cpu"))


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def get_extension(model: nn.Module) -> Extension | None:
    """The extension of a model (through PEFT, DDP and compile wrappers), or None."""
    for module in model.modules():
        if isinstance(module, ScaledRotary):
            return module.extension
    return None
