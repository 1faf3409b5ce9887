"""Requests of many scales at once in llama.cpp: each text as transformers' own static scaling gives it alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")

from served import GREEDY_ON, collect, engine_over, make_checkpoint, prompt, static_model, static_tokens

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request, Sampling

LENGTHS = [3, 20, 50, 57, 64, 90, 120, 121, 180, 240, 300, 480]
"""Of prompts; with eight new tokens at scales 1, 2, 4 and 8 of the native window 64."""
CASES = [
    ("llama", "linear", None),
    ("llama", "yarn", None),
    ("llama", "yarn", 0.04),
    ("llama", "yarn", 0.0),
    ("llama", "ntk", None),
    ("qwen2", "yarn", 0.16),
    ("qwen3", "linear", None),
]


@pytest.mark.parametrize(("model_type", "method", "slope"), CASES)
def test_mixed_scales_equal_static_scaling(here: Path, model_type: str, method: str, slope: float | None) -> None:
    requests = [Request(prompt_ids=prompt(n, seed=n), max_new_tokens=8, sampling=GREEDY_ON) for n in LENGTHS]
    requests += [Request(prompt_ids=prompt(30, seed=9), max_new_tokens=8, sampling=GREEDY_ON, scale=g) for g in (3, 5)]
    random.Random(0).shuffle(requests)
    with engine_over(make_checkpoint(here / "model", model_type, method, slope)) as engine:
        streams = [engine.submit(request) for request in requests]
        found = [collect(stream)[0] for stream in streams]
        scales = [stream.admission.scale for stream in streams]
        assert set(scales) == {1.0, 2.0, 3.0, 4.0, 5.0, 8.0} and len(requests) == 14
        # Once more, in another order and company.
        again = [(place, engine.submit(requests[place])) for place in reversed(range(0, len(requests), 2))]
        assert [collect(stream)[0] for _, stream in again] == [found[place] for place, _ in again]
    for request, scale, tokens in zip(requests, scales, found, strict=True):
        expected = static_tokens(static_model(model_type, method, scale, slope), request)
        assert tokens == expected, f"{len(request.prompt_ids)} tokens at scale {scale:g}"


@pytest.mark.parametrize(("method", "slope"), [("yarn", 0.04), ("linear", 0.05), ("linear", None)])
def test_logprobs_and_draws_are_the_other_engine_s(here: Path, method: str, slope: float | None) -> None:
    """Of a linear slope too, which no transformers config can say."""
    checkpoint = make_checkpoint(here / "model", "llama", method, slope)
    greedy = Sampling(ignore_eos=True, logprobs=5)
    drawn = [
        Sampling(temperature=0.9, seed=5, ignore_eos=True),
        Sampling(temperature=1.2, top_p=0.8, top_k=50, min_p=0.01, seed=6, ignore_eos=True),
    ]
    requests = [Request(prompt_ids=prompt(n, seed=n), max_new_tokens=8, sampling=greedy) for n in (20, 100, 300)]
    requests += [Request(prompt_ids=prompt(100, seed=100), max_new_tokens=8, sampling=sampling) for sampling in drawn]
    with BatchEngine.load(checkpoint, dtype="float32", device="cpu", kv_tokens=4096) as other:
        expected = [collect(other.submit(request)) for request in requests]
    with engine_over(checkpoint) as engine:
        found = [collect(engine.submit(request)) for request in requests]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == theirs[0] and ours[1] == theirs[1] == "length"
        assert len(ours[2]) == len(theirs[2])
        for one, other_one in zip(ours[2], theirs[2], strict=True):
            assert one.token_id == other_one.token_id
            assert one.logprob == pytest.approx(other_one.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other_one.top]
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other_one.top], abs=1e-4)
    assert len(found[0][2]) == 8 and len(found[0][2][0].top) == 5


def test_a_calibrated_schedule_reads_past_scale_times_native(here: Path) -> None:
    schedule = [{"window": 64, "scale": 1.0}, {"window": 256, "scale": 3.0}]
    checkpoint = make_checkpoint(here / "model", "llama", "yarn", schedule=schedule)
    request = Request(prompt_ids=prompt(240), max_new_tokens=8, sampling=GREEDY_ON)
    with engine_over(checkpoint) as engine:
        stream = engine.submit(request)
        assert (stream.admission.scale, stream.admission.window, engine.schedule[1].scale) == (3.0, 256, 3.0)
        found = collect(stream)[0]
    assert found == static_tokens(static_model("llama", "yarn", 3.0, None), request)
    assert found != static_tokens(static_model("llama", "yarn", 4.0, None), request), "the scale is seen"


def test_weights_are_in_memory_once(here: Path) -> None:
    """A slope of its own needs the file opened again for a scale: as a mapping of the same pages."""
    checkpoint = make_checkpoint(here / "model", "llama", "yarn", 0.04)
    with engine_over(checkpoint) as engine:
        for length in (20, 100, 200, 400):
            collect(engine.submit(Request(prompt_ids=prompt(length), max_new_tokens=2, sampling=GREEDY_ON)))
        assert len(engine._weights._handles) == 4
        name = str(engine.file.path.resolve())
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
        assert len(maps) >= 4 and all(line.split()[1].startswith("r--") for line in maps)
        for scale in range(2, 40):  # callers may name any scale: what nobody uses is closed
            request = Request(prompt_ids=prompt(5), max_new_tokens=2, sampling=GREEDY_ON, scale=scale / 5 + 1)
            collect(engine.submit(request))
        assert len(engine._weights._handles) <= 6 and len(engine.contexts()) <= 5
    assert torch.get_num_threads() == 1
