"""Packed rows whose requests have groups of their own: every token's logits are those that the model alone gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from interpreted import needs_interpreter, run_interpreted, starts_interpreter

from e2llm.hf import Extension, install
from e2llm.hf import packed as packed_module
from e2llm.hf import packed_model as packed_model_module
from e2llm.hf import self_extend as self_extend_module
from e2llm.hf.group_tables import Grouping
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.packed_groups import Turns, groups_of
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.paged import ATTENTION
from e2llm.hf.paged_decode import BlockTables
from e2llm.hf.rerotate import Rerotation

NEIGHBOURS, PAGE = 10, 4
SCALES = (1.0, 2.0, 4.0, 8.0)
"""Groups 1, 3, 5 and 10."""
CPU = torch.device("cpu")


def extended(name: str = "llama", neighbours: int = NEIGHBOURS, **options: Any) -> tuple[Any, Extension]:
    local = {"sliding_window": 16} if name == "gemma3_text" else {}
    model = tiny_model(name, **local, **options)
    return model, install(model, method="self_extend", native_window=WINDOW, neighbours=neighbours)


class Reading:
    """Texts that are read into pages of no order, a piece of each a step."""

    def __init__(self, packed: PackedModel, texts: list[torch.Tensor], scales: list[float], *, kernels: bool) -> None:
        self.packed, self.texts, self.scales = packed, texts, scales
        needed = [-(-len(text) // PAGE) for text in texts]
        self.store = KeyValuePages(packed.shapes, sum(needed), PAGE, CPU)
        for layer in self.store.layers.values():
            layer.normal_()  # what earlier owners left is never seen
        order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1))
        self.tables = np.split(order, np.cumsum(needed)[:-1])
        self.on_device = BlockTables(len(texts), max(needed), CPU) if kernels else None
        self.found: list[list[torch.Tensor]] = [[] for _ in texts]

    @torch.no_grad()
    def step(self, spans: dict[int, tuple[int, int]]) -> None:
        """Tokens `spans[text]` of texts; those of one token first."""
        grouping = self.packed.extension.grouping
        assert grouping is not None
        order = sorted(spans, key=lambda text: spans[text][1] - spans[text][0] > 1)
        pieces = []
        for text in order:
            start, end = spans[text]
            pieces.append(Piece(self.tables[text], start, end - start, grouping.group(self.scales[text])))
            if self.on_device is not None:
                self.on_device.set(text, self.tables[text])
        singles = None
        if self.on_device is not None:
            singles = np.array([text for text in order if spans[text][1] - spans[text][0] == 1], dtype=np.int64)
        step = PackedStep(self.store, pieces, self.on_device, singles, grouping)
        counts = [piece.count for piece in pieces]
        ids = torch.cat([self.texts[text][slice(*spans[text])] for text in order]).numpy()
        which = np.repeat(order, counts)
        logits = self.packed.logits(step, ids, self.scales, which, range(sum(counts)))
        for text, part in zip(order, logits.split(counts), strict=True):
            self.found[text].append(part)

    @torch.no_grad()
    def check(self, tolerance: float = 1e-4) -> None:
        """What was found, against each text read whole by the model's own attention."""
        self.packed.restore()
        for text, scale, parts in zip(self.texts, self.scales, self.found, strict=True):
            self.packed.extension.set_scale(scale)
            alone = self.packed.model(text[None]).logits[0]
            torch.testing.assert_close(torch.cat(parts), alone[-sum(map(len, parts)) :], rtol=0, atol=tolerance)


CUTS = [
    [0, 1, 2, 9, 10, 11, 12, 13, 14, 41, 42, 50],
    [0, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 80],
    [0, 30, 31, 32, 33, 34, 35, 36, 37, 40, 75, 140],
    [0, 4, 13, 33, 60, 61, 62, 63, 64, 65, 66, 67],
    [0, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130],
]
"""One piece of each text a step: single tokens and chunks, before, at and after the edge, over page bounds."""
CUT_SCALES = [1.0, 2.0, 4.0, 8.0, 8.0]


def read_in_cuts(name: str, *, kernels: bool = False, neighbours: int = NEIGHBOURS) -> Reading:
    model, extension = extended(name, neighbours)
    packed = PackedModel(model, extension, kernels=kernels)
    texts = [token_ids(1, cut[-1], seed)[0] for seed, cut in enumerate(CUTS)]
    reading = Reading(packed, texts, CUT_SCALES, kernels=kernels)
    for turn in range(len(CUTS[0]) - 1):
        reading.step({text: (cut[turn], cut[turn + 1]) for text, cut in enumerate(CUTS)})
    return reading


@pytest.mark.parametrize("neighbours", [1, NEIGHBOURS, 16, 63])
@pytest.mark.parametrize("name", ["llama", "glm", "gpt_neox", "qwen3", "gemma3_text"])
def test_pieces_of_any_length_at_any_scale(name: str, neighbours: int) -> None:
    """Partial rotary, interleaved channels, query norms; groups from 1 to many in one row."""
    read_in_cuts(name, neighbours=neighbours).check()


def test_chunks_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_extend_module, "has_kernels", lambda query: False)
    monkeypatch.setattr(self_extend_module, "BLOCK_QUERIES", 7)
    read_in_cuts("llama").check()


def test_low_precision_stores_far_keys_in_its_type() -> None:
    model, extension = extended()
    model.bfloat16()
    packed = PackedModel(model, extension)
    reading = Reading(packed, [token_ids(1, 90)[0], token_ids(1, 40, 5)[0]], [8.0, 2.0], kernels=False)
    for a, b in pairwise([0, 30, 31, 32, 40]):
        reading.step({0: (a, b), 1: (a, b)})
    reading.step({0: (40, 89)})
    reading.step({0: (89, 90)})
    reading.check(tolerance=0.05)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_interpreter)])
def test_a_short_request_reads_the_pages_of_a_long_one(kernels: bool) -> None:
    """Equal beginnings, one scale: eight tokens of them, all near, and 120, most of them far."""
    model, extension = extended()
    packed = PackedModel(model, extension, kernels=kernels)
    long, short = token_ids(1, 140)[0], token_ids(1, 3, 9)[0]
    texts = [long, torch.cat((long[:4], short)), torch.cat((long[:120], short))]
    reading = Reading(packed, texts, [4.0] * 3, kernels=kernels)
    reading.step({0: (0, 6)})
    reading.tables[1][:1] = reading.tables[0][:1]
    reading.step({0: (6, 125), 1: (4, 5)})
    reading.tables[2][:30] = reading.tables[0][:30]
    reading.step({0: (125, 126), 1: (5, 6), 2: (120, 121)})
    reading.step({0: (126, 140), 1: (6, 7), 2: (121, 123)})
    reading.check()


@starts_interpreter
@pytest.mark.timeout(600)
def test_with_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
@pytest.mark.parametrize("name", ["llama", "glm", "gpt_neox", "gemma3_text"])
def test_single_tokens_by_kernels(name: str) -> None:
    read_in_cuts(name, kernels=True).check()


def test_requests_of_one_scale_see_no_groups() -> None:
    """At group 1 a step knows no turns: the kernels and batches of a model without groups."""
    model, extension = extended()
    packed = PackedModel(model, extension)
    store = KeyValuePages(packed.shapes, 40, PAGE, CPU)
    pieces = [Piece(np.arange(1, 41), 50, 1), Piece(np.arange(1, 41), 9, 100)]
    step = PackedStep(store, pieces, grouping=extension.grouping)
    plan = step._plan(None, True, torch.float32)
    assert step._turns is None and plan.singles[0].far is None and not plan.chunks[0].grouped


def test_what_pages_hold_is_counted() -> None:
    model, extension = extended()
    packed = PackedModel(model, extension)
    other = tiny_model("llama")
    plain = PackedModel(other, install(other, method="linear"))
    assert [shape.far_dim for shape in plain.shapes.values()] == [0, 0]
    assert 2 * packed.token_bytes == 3 * plain.token_bytes, "key, value, far key"
    for own in (packed, plain):
        store = KeyValuePages(own.shapes, 2, PAGE, CPU)
        assert sum(layer.nbytes for layer in store.layers.values()) == 3 * PAGE * own.token_bytes


def test_groups_follow_from_scales() -> None:
    grouping = Grouping(WINDOW, NEIGHBOURS, (1.0,))
    assert [grouping.group(scale) for scale in SCALES] == [1, 3, 5, 10]
    assert groups_of(grouping, SCALES, np.array([2, 0, 2, 3])).tolist() == [5, 1, 5, 10]


# ---- the probe of a model that is set up


def break_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_model_module, "Piece", lambda table, start, count, group: Piece(table, start, count))


def break_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    step = packed_module.PackedStep

    def later(pages: Any, pieces: Any, tables: Any, rows: Any, grouping: Grouping) -> Any:
        return step(pages, pieces, tables, rows, grouping._replace(neighbours=grouping.neighbours + 1))

    monkeypatch.setattr(packed_model_module, "PackedStep", later)


def break_far_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "key", lambda self, key: key)


def break_far_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "query", lambda self, query: query)


@pytest.mark.parametrize("damage", [break_groups, break_the_edge, break_far_keys, break_far_queries])
def test_the_probe_sees_what_is_wrong(damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, extension = extended(neighbours=30)
    own, grouping = model.config._attn_implementation, extension.grouping
    extension.set_scale(4)
    PackedModel(model, extension).restore()
    damage(monkeypatch)
    with pytest.raises(ValueError, match="other logits than its own"):
        PackedModel(model, extension)
    assert extension.grouping == grouping and extension.scale == 4 and model.config._attn_implementation == own


@torch.no_grad()
def test_the_probe_leaves_the_model_as_it_was() -> None:
    model, extension = extended(neighbours=30)
    ids = token_ids(1, 100)
    extension.set_scale(4)
    before = model(ids).logits
    packed = PackedModel(model, extension)
    assert model.config._attn_implementation == ATTENTION
    packed.restore()
    assert torch.equal(model(ids).logits, before)


def softcapped(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"softcap": 20.0}


def test_softcaps_are_refused() -> None:
    model, extension = extended()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(softcapped, with_kwargs=True)
    own = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"self_extend' with softcap or sinks.*infer\.Engine"):
        PackedModel(model, extension)
    assert model.config._attn_implementation == own


def test_turning_cached_pages_is_refused() -> None:
    packed = PackedModel(*extended())
    with pytest.raises(ValueError, match=r"method = 'self_extend'.*leave rerotate out"):
        Rerotation(packed, KeyValuePages(packed.shapes, 2, PAGE, CPU))
