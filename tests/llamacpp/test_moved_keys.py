"""Method self_extend in llama.cpp, whose keys are moved as a text grows: what our own attention makes of the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")

from architectures import WINDOW
from served import collect, engine_over, make_checkpoint, prompt

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request, Sampling
from e2llm.export import export
from e2llm.hf import CheckpointInfo
from e2llm.llamacpp import LlamaCppEngine
from e2llm.llamacpp.library import Context
from e2llm.positions.frames import Frames
from e2llm.positions.groups import group_of_scale

NEIGHBOURS = 22
LENGTHS = (3, 21, 22, 23, 50, 57, 64, 90, 120, 180, 240, 300, 470)
"""Of prompts: around the neighbours, the native window 64, and its multiples up to scale 8."""
NEW = 30
"""More than the neighbours: keys of new tokens become far ones."""
LOGPROBS = Sampling(ignore_eos=True, logprobs=3)
Answer = tuple[Any, ...]


@functools.cache
def checkpoint_of(model_type: str, folder: Path) -> str:
    return make_checkpoint(folder / f"se-{model_type}", model_type, "self_extend", neighbours=NEIGHBOURS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda model_type: checkpoint_of(model_type, folder)


def requests() -> list[Request]:
    found = [
        Request(prompt_ids=prompt(n, seed=n), max_new_tokens=min(NEW, 512 - n), sampling=LOGPROBS) for n in LENGTHS
    ]
    found += [Request(prompt_ids=prompt(100, seed=9), max_new_tokens=NEW, sampling=LOGPROBS, scale=g) for g in (3, 7)]
    random.Random(0).shuffle(found)
    return found


def exact(scale: float) -> Frames | None:
    """A frame for every token that has far keys."""
    group = group_of_scale(scale, WINDOW, NEIGHBOURS)
    return None if group == 1 else Frames(group, NEIGHBOURS, 1, 1)


def answers(engine: Any, asked: list[Request]) -> list[Answer]:
    """All at once."""
    streams = [engine.submit(request) for request in asked]
    return [(stream.admission.scale, *collect(stream)) for stream in streams]


def own(checkpoint: str, asked: list[Request]) -> list[Answer]:
    with BatchEngine.load(checkpoint, dtype="float32", device="cpu", kv_tokens=8192) as engine:
        return answers(engine, asked)


def far_apart(found: Answer, expected: Answer) -> float:
    """Most nats between the probabilities of the first token, and of others while the texts are equal."""
    apart, same = [], True
    for one, other in zip(found[3], expected[3], strict=True):
        if same:
            told, theirs = dict(one.top), dict(other.top)
            apart += [abs(told[token] - theirs[token]) for token in told.keys() & theirs.keys()]
        same = same and one.token_id == other.token_id
    return max(apart, default=0.0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_frame_for_each_token_is_self_extend(here: Path, checkpoint: Callable[[str], str], model_type: str) -> None:
    asked = requests()
    expected = own(checkpoint(model_type), asked)
    with engine_over(checkpoint(model_type)) as engine:
        engine._frames = exact
        found = answers(engine, asked)
        again = answers(engine, asked[::-2])
        assert not any(held.frames for held in engine._contexts._held.values()), "whose requests have ended"
    assert {answer[0] for answer in found} == {1.0, 2.0, 3.0, 4.0, 7.0, 8.0}
    for request, ours, theirs in zip(asked, found, expected, strict=True):
        told = f"{len(request.prompt_ids)} tokens at scale {ours[0]:g}"
        assert ours[:3] == theirs[:3] and ours[2] == "length", told
        for one, other in zip(ours[3], theirs[3], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4), told
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4), told
    assert [answer[1] for answer in again] == [answer[1] for answer in found[::-2]], "company changes nothing"


def test_keys_of_two_bytes(here: Path, checkpoint: Callable[[str], str]) -> None:
    """Each move rounds them once more."""
    asked = requests()
    expected = own(checkpoint("llama"), asked)
    with engine_over(checkpoint("llama"), kv_type="f16") as engine:
        engine._frames = exact
        found = answers(engine, asked)
    assert max(far_apart(ours, theirs) for ours, theirs in zip(found, expected, strict=True)) < 0.05


def test_usual_frames_are_near_to_it(here: Path, checkpoint: Callable[[str], str]) -> None:
    """First tokens: their frame is exact, the keys before them were read with fewer neighbours. Beside other groups."""
    asked = [
        Request(prompt_ids=prompt(n, seed=n), max_new_tokens=1, sampling=Sampling(ignore_eos=True, logprobs=5))
        for n in (23, 40, 62, 90, 120, 180, 240, 300, 480)
    ]
    expected = own(checkpoint("llama"), asked)
    with engine_over(checkpoint("llama")) as engine:
        usual = engine._frames
        found = answers(engine, asked)
        engine._frames = lambda scale: None
        near_alone = answers(engine, asked)
        engine._frames = lambda scale: usual(max(2.0, 16 / scale))
        wrong = answers(engine, asked)

    def mean(given: list[Answer]) -> float:
        far = [pair for pair in zip(given, expected, strict=True) if pair[1][0] > 1]
        return sum(far_apart(ours, theirs) for ours, theirs in far) / len(far)

    assert [answer[0] for answer in expected] == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert far_apart(ours, theirs) < 1e-4, "no key is moved within the native window"
    assert mean(found) < 0.5 * min(mean(near_alone), mean(wrong)), (mean(found), mean(near_alone), mean(wrong))


def test_exports_say_what_serving_needs_and_are_proven(here: Path, checkpoint: Callable[[str], str]) -> None:
    result = export(checkpoint("llama"), here / "out", to="gguf", gguf_type="f32")
    assert result.open_scales == (1, 2, 4, 8)
    proven = [check for check in result.checks if "in llama.cpp at scale" in check.name]
    assert [check.name[-8:] for check in proven] == [" scale 2", " scale 8"] and all(check.passed for check in proven)
    info = CheckpointInfo.load(here / "out")
    assert info is not None and (info.method, info.neighbours) == ("self_extend", NEIGHBOURS)
    with LlamaCppEngine.load(str(here / "out"), kv_tokens=2048, threads=1, tell=lambda line: None) as engine:
        assert (engine.file.method, engine.file.neighbours) == ("self_extend", NEIGHBOURS)
        assert engine.file.frames(1.0) is None
        moved = engine.file.frames(4.0)
        assert moved is not None and (moved.group, moved.neighbours, moved.piece, moved.ahead) == (6, 22, 5, 1)


def test_what_cannot_be_moved_is_said(
    here: Path, checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "can_move", False)
    with engine_over(checkpoint("llama")) as engine:
        near, far = (engine.submit(Request(prompt_ids=prompt(n), max_new_tokens=2, sampling=LOGPROBS)) for n in (9, 99))
        assert collect(near)[1] == "length"
        _, reason, _, error = collect(far)
        assert reason == "error" and "cannot move the cached keys of architecture 'llama'" in (error or "")
