"""What runs of the study try beside recipes: cut-offs, copies and losses that do what their names say, and end with the
run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, tiny_model
from scripts_of import load_script

from e2llm.data import Corpus
from e2llm.data.parts import Window
from e2llm.data.planted import PlantedPart
from e2llm.hf import get_extension
from e2llm.positions.frequencies import METHODS, frequencies
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.rope import Rope
from e2llm.positions.scales import ScalesConfig
from e2llm.train import run as training

ROOT = Path(__file__).parents[1] / "benchmarks"
WIDTH, BASE = 64, 10_000.0
ROPE = Rope(
    rotary_dim=WIDTH, base=BASE, native_window=512, inv_freq=tuple(BASE ** (-2 * j / WIDTH) for j in range(WIDTH // 2))
)


@pytest.fixture(scope="module")
def tried() -> Any:
    load_script(ROOT / "study.py")
    return load_script(ROOT / "study_tried.py")


def test_channels_beyond_the_cut_offs_are_kept_and_divided(tried: Any) -> None:
    turns = 512 * np.asarray(ROPE.inv_freq) / (2 * math.pi)
    before = frequencies(ROPE, "yarn", 16.0).inv_freq
    for fast, slow in ((8.0, 1.0), (64.0, 2.0)):
        with tried.trying(tried.Tried(ramp=(fast, slow))):
            found = frequencies(ROPE, "yarn", 16.0).inv_freq.numpy() / np.asarray(ROPE.inv_freq)
        # The bounds of the ramp are whole channels: one more turn than the cut-off's own channel has is kept.
        assert found[turns > fast * 1.4] == pytest.approx(1.0, rel=1e-5)
        assert found[turns < slow / 1.4] == pytest.approx(1 / 16, rel=1e-5)
        between = found[(turns < fast / 1.4) & (turns > slow * 1.4)]
        assert len(between) > 3 and (between < 0.9999).all() and (between > 1 / 15.9).all()
    torch.testing.assert_close(frequencies(ROPE, "yarn", 16.0).inv_freq, before, rtol=0, atol=0)
    assert METHODS["yarn"](ROPE, 16.0).inv_freq.equal(before)


def test_first_segments_carry_no_loss(tried: Any) -> None:
    sampler = PositionSampler(
        native_window=64,
        training_window=32,
        scales=ScalesConfig(distribution="weighted", max_scale=8, values=(1, 8)),
        placement=PlacementConfig(kind="jumps", max_jumps=3, native_kind="none"),
    )
    rows = [{"input_ids": torch.arange(32), "labels": torch.arange(32), "sample_index": index} for index in range(60)]
    with tried.trying(tried.Tried(far_loss=True)):
        batch = training.PlacingCollator(sampler)(rows)
    assert training.PlacingCollator is not tried.FarLossCollator
    seen = set()
    for labels, placement in zip(batch["labels"], batch["placements"], strict=True):
        scored = torch.nonzero(labels != tried.IGNORED)[:, 0].tolist()
        assert scored == list(range(scored[0], 32))
        # Just what stands before a token without a gap is its own segment; the leading tokens are nobody's far text.
        far = [t for t in range(32) if placement.positions[t] - placement.positions[4] > t - 4]
        assert scored == (far or list(range(32)))
        seen.add((placement.scale, bool(far)))
    assert {(1.0, False), (8.0, True)} <= seen


def test_jumps_end_at_an_anchor(tried: Any) -> None:
    jumps = PlacementConfig(kind="jumps", max_jumps=3, far_weight=1.0)
    sampler = PositionSampler(
        native_window=64, training_window=32, scales=ScalesConfig(distribution="fixed", max_scale=8), placement=jumps
    )
    with tried.trying(tried.Tried(end_tokens=5)):
        draws = [sampler.draw(index) for index in range(60)]
    for drawn in draws:
        assert drawn.positions[-5:].tolist() == list(range(8 * 64 - 5, 8 * 64))
        assert (np.diff(drawn.positions) > 0).all() and drawn.positions[:5].tolist() == list(range(5))
        assert drawn.far is not None and drawn.far.segments.max() < drawn.far.most_segments == 4
    assert {2, 3} <= {int(drawn.far.segments.max()) for drawn in draws if drawn.far}
    assert any(sampler.draw(index).positions[-1] < 8 * 64 - 1 for index in range(60))


def test_a_share_of_the_windows_says_a_span_again(tried: Any) -> None:
    plain = _Windows()
    windows = tried._CopyingWindows(dataclasses.make_dataclass("P", ["share", "inner"])(0.25, plain), 256)
    copied = 0
    for number in range(400):
        before, after = plain.draw(number, 7).tokens, windows.draw(number, 7).tokens
        assert np.array_equal(after, windows.draw(number, 7).tokens)
        changed = np.flatnonzero(before != after)
        if not len(changed):
            continue
        copied += 1
        first, size = changed[0], len(changed)
        assert first >= 128 and 16 <= size <= 32 and changed[-1] == first + size - 1
        span = after[first : first + size]
        # Every token of the plain window is another one, so the span's first names its place.
        assert np.array_equal(before[span[0] - before[0] :][:size], span) and span[0] - before[0] + size <= 128
    assert 70 <= copied <= 130
    assert tried.with_copies("corpus", 0.0) == "corpus"
    weighed = Corpus((PlantedPart(None, None, 0.5, 4, 4.0),), (), ())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"copied = 0\.5: not with data\.planted_weight"):
        tried.with_copies(weighed, 0.5)


class _Windows:
    num_unusable = 0

    def windows(self, window: int) -> _Windows:
        return self

    def draw(self, number: int, seed: int, jumps: Any = None) -> Window:
        return Window(np.arange(256, dtype=np.int64) + 1000 * number, None, np.asarray([0]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ramp = [1, 8]", "the larger first"),
        ("ramp = [8]", "two cut-offs"),
        ("ramp = 8", "ramp = 8"),
        ("copied = 1.5", "copied = 1.5"),
        ("copied = true", "copied = True"),
        ("far_loss = 1", "far_loss = 1"),
        ("end_tokens = -1", "end_tokens = -1"),
        ("end_tokens = 1.5", "end_tokens = 1.5"),
        ('method = "ntk"\nfar_loss = true', "reads the base untrained"),
        ('method = "none"\nscales = {512 = [2]}', "none has no scale but 1"),
        ("self_extend = 1", "self_extend = 1"),
        ('method = "none"\nself_extend = true', "true for weights that are trained here"),
    ],
)
def test_what_cannot_be_tried_is_refused(tmp_path: Path, row: str, message: str) -> None:
    study: Any = load_script(ROOT / "study.py")
    plan = tmp_path / "plan.toml"
    plan.write_text(f'[[runs]]\nname = "a"\n{row}\n')
    with pytest.raises(ValueError, match=message):
        study.read_plan(plan, lambda *_: "[]", ["model.name=x"], [])


def test_self_extend_is_taken_off_again() -> None:
    study: Any = load_script(ROOT / "study.py")
    model: Any = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(0))
    own = model(tokens).logits
    shared = study.Study.__new__(study.Study)
    shared.measured, shared.start = model, {k: v.clone() for k, v in model.state_dict().items()}
    shared.untrained("self_extend")
    extension = get_extension(model)
    assert extension is not None
    extension.set_scale(4)
    assert (model(tokens).logits - own).abs().max() > 1e-4
    shared.untrained("none")
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(tokens).logits, own)


def test_trained_weights_are_read_with_self_extend(tmp_path: Path) -> None:
    study: Any = load_script(ROOT / "study.py")
    plan = tmp_path / "plan.toml"
    plan.write_text('[[runs]]\nname = "a"\nself_extend = true\n[[runs]]\nname = "b"\n')
    first, second = study.read_plan(plan, lambda *_: "[]", ["model.name=x"], [])
    model: Any = tiny_model("llama")
    shared = study.Study.__new__(study.Study)
    shared.measured = model
    for run in (first, second):  # weights that are there already
        shared.last = ({**study.what_trains(run.recipe), "tried": run.tried}, None)
        shared.train(run)
        extension = get_extension(model)
        assert extension is not None
        assert extension.method == ("self_extend" if run.self_extend else run.recipe.method)
