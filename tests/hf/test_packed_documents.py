"""Documents that share a row: each draws for itself, and turns as it would in a row of its own."""

from __future__ import annotations

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from torch import nn

from e2llm.hf import install
from e2llm.hf.documents import document_lengths
from e2llm.hf.extension import Extension
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

LENGTHS = [12, 20, 3]
IDS = token_ids(1, sum(LENGTHS))
RESTARTING = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SAMPLER = PositionSampler(
    native_window=WINDOW,
    training_window=sum(LENGTHS),
    scales=ScalesConfig(distribution="log_uniform", max_scale=16),
    placement=PlacementConfig(kind="jumps"),  # needs six tokens: the last document is too short
    seed=3,
)


def extended() -> tuple[nn.Module, Extension]:
    model = tiny_model("llama").train()
    extension = install(model, method="yarn")
    extension.sampler = SAMPLER
    return model, extension


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[0, 1, 2, 3]], None),
        ([[0, 1, 2, 0, 1]], [[3, 2]]),
        ([[0, 1, 0, 1, 0, 0]], [[2, 2, 2]]),  # padded with zeros
        ([[0, 1, 2, 3], [0, 1, 0, 1]], [[4], [2, 2]]),
        ([[1, 1, 0, 1]], [[2, 2]]),  # padded on the left
        ([[0, 1, 2, 2]], None),  # padded on the right
    ],
)
def test_lengths(ids: list[list[int]], expected: list[list[int]] | None) -> None:
    assert document_lengths(torch.tensor(ids), len(ids)) == expected


def test_lengths_of_what_every_row_shares() -> None:
    assert document_lengths(torch.tensor([[0, 1, 0]]), 2) == [[2, 1], [2, 1]]
    assert document_lengths(None, 2) is None
    assert document_lengths(torch.zeros(3, 2, 5, dtype=torch.int64), 2) is None


def test_each_document_is_read_as_in_a_row_of_its_own() -> None:
    model, extension = extended()
    extension.expect([40, 41, 42])
    packed = model(input_ids=IDS, position_ids=RESTARTING, use_cache=False).logits
    parts, start, scales = [], 0, set()
    for number, length in enumerate(LENGTHS):
        alone, of_it = extended()
        draw = SAMPLER.draw_document(40 + number, length)
        scales.add(draw.scale)
        of_it.sampler = None
        of_it.place([draw])
        parts.append(alone(input_ids=IDS[:, start : start + length], use_cache=False).logits)
        start += length
    assert len(scales) == 3
    torch.testing.assert_close(packed, torch.cat(parts, 1), atol=2e-5, rtol=1e-5)


def test_a_document_too_short_keeps_its_positions_and_draws_its_scale() -> None:
    draw = SAMPLER.draw_document(42, 3)
    assert draw.positions.tolist() == [0, 1, 2]
    assert draw.scale == SAMPLER.draw(42, 30).scale
    assert SAMPLER.draw_document(42, 30).positions.tolist() == SAMPLER.draw(42, 30).positions.tolist()


def test_draws_go_on_from_where_they_are_told_to() -> None:
    model, extension = extended()
    seen = []
    for start in (0, 7, 7):
        extension.start_at(start)
        seen.append(model(input_ids=IDS, position_ids=RESTARTING, use_cache=False).logits)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    with pytest.raises(ValueError, match="sample_index = -1"):
        extension.start_at(-1)


def test_ranks_draw_different_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank in range(3):
        monkeypatch.setattr("e2llm.hf.extension._rank", lambda rank=rank: (rank, 3))
        _, extension = extended()
        # counts of a rank's own, as sample packing makes them
        drawn += [i for count in (2, 3 + rank) for i in extension._sample_indices(count, blocks=False)]
    assert len(set(drawn)) == len(drawn) == 3 * 2 + 3 + 4 + 5


def test_indices_that_do_not_fit_the_documents() -> None:
    model, extension = extended()
    extension.expect([1])
    with pytest.raises(ValueError, match="1 sample indices were named for a batch of 3 samples"):
        model(input_ids=IDS, position_ids=RESTARTING)


def test_after_training_the_set_scale_is_back() -> None:
    model, extension = extended()
    plain = tiny_model("llama")
    extension.set_scale(1.0)
    model(input_ids=IDS, position_ids=RESTARTING, use_cache=False)
    with torch.no_grad():
        found = model.eval()(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, plain.eval()(input_ids=IDS, use_cache=False).logits)
