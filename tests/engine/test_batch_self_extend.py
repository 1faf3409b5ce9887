"""Method self_extend in batches: every text is the one that `infer.Engine` gives that request alone."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model
from batches import MAX_SCALE, NO_END, Answer, collect, mixed_requests, prompt, run
from interpreted import needs_interpreter, run_interpreted, starts_interpreter

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request, Sampling
from e2llm.evaluate.batched import check_batches
from e2llm.hf import install
from e2llm.infer import Engine, plan_request

NEIGHBOURS = 22
"""No multiple of a page."""


LONG_ANSWERS = [Request(prompt_ids=prompt(n, n), max_new_tokens=45, scale=s) for n, s in ((20, 2.0), (90, 4.0))]
"""So long that keys of new tokens become far ones."""


@functools.cache
def model_of(model_type: str) -> Any:
    local = {"sliding_window": 16} if model_type == "gemma3_text" else {}
    model: Any = tiny_model(model_type, **local, **NO_END)
    model.generation_config.eos_token_id = None
    install(model, method="self_extend", native_window=WINDOW, neighbours=NEIGHBOURS)
    return model


def serving(model_type: str = "llama", **options: Any) -> BatchEngine:
    return BatchEngine(model_of(model_type), None, **({"max_scale": MAX_SCALE} | options))


@functools.cache
def alone(model_type: str, prompt_ids: tuple[int, ...], new: int, scale: float) -> tuple[int, ...]:
    """Of a model that no engine holds at the moment."""
    plan = plan_request(
        len(prompt_ids),
        native_window=WINDOW,
        max_scale=MAX_SCALE,
        policy="ladder",
        schedule=(),
        max_new_tokens=new,
        scale=scale,
    )
    return tuple(Engine(model_of(model_type), None, max_scale=MAX_SCALE).complete(list(prompt_ids), plan).token_ids)


def served(engine: BatchEngine, requests: list[Request]) -> list[tuple[Request, float, Answer]]:
    """Requests with their scales and answers; memory is back at the end."""
    streams = [engine.submit(request) for request in requests]
    found = [(r, s.admission.scale, collect(s)) for r, s in zip(requests, streams, strict=True)]
    engine.clear_prefix_cache()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    return found


def check(model_type: str, found: list[tuple[Request, float, Answer]]) -> None:
    for request, scale, answer in found:
        assert answer.finish_reason == "length", answer.error
        assert answer.tokens == alone(model_type, request.prompt_ids, request.max_new_tokens or 0, scale)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_tokens": 1},
        {"chunk_tokens": 7, "page_tokens": 4},
        {"chunk_tokens": 33, "page_tokens": 1, "kv_tokens": 700},
        {"chunk_tokens": 64, "page_tokens": 32, "max_running": 5, "run_ahead": True},
        {"page_tokens": 64, "prefix_cache": False, "kv_tokens": 1024},
    ],
    ids=str,
)
def test_mixed_batches(options: dict[str, Any]) -> None:
    requests = mixed_requests() + LONG_ANSWERS
    random.Random(0).shuffle(requests)
    with serving(**options) as engine:
        found = served(engine, requests)
    assert {scale for _, scale, _ in found} == {1.0, 2.0, 3.0, 4.0, 8.0}
    check("llama", found)


@pytest.mark.parametrize("model_type", ["glm", "gpt_neox", "qwen3", "qwen3_moe", "gemma3_text"])
def test_families(model_type: str) -> None:
    with serving(model_type, chunk_tokens=77) as engine:
        found = served(engine, mixed_requests()[::2])
    check(model_type, found)


def test_equal_beginnings_share_pages_whatever_follows() -> None:
    """One scale: of a text all of whose keys are near, and of one most of whose keys are far."""
    long = Request(prompt_ids=prompt(240), max_new_tokens=6, scale=4.0)
    near = Request(prompt_ids=prompt(240)[:16] + prompt(3, 5), max_new_tokens=2, scale=4.0)
    far = Request(prompt_ids=prompt(240)[:200] + prompt(3, 6), max_new_tokens=6, scale=4.0)
    other = dataclasses.replace(far, scale=8.0)
    with serving(page_tokens=8) as engine:
        first = run(engine, [near, long])
        assert engine.stats().cached_tokens_total == 16, "the long one goes on from the short one's"
        then = run(engine, [far, near])
        assert engine.stats().cached_tokens_total == 16 + 200 + 16
        last = run(engine, [other])
        assert engine.stats().cached_tokens_total == 16 + 200 + 16, "another scale, other groups"
    asked = [near, long, far, near, other]
    check("llama", [(r, r.scale or 0, a) for r, a in zip(asked, (*first, *then, *last), strict=True)])


@torch.no_grad()
def test_log_probabilities() -> None:
    lengths = (10, 60, 90, 150, 300)
    requests = [Request(prompt_ids=prompt(n, n), max_new_tokens=6, sampling=Sampling(logprobs=1)) for n in lengths]
    with serving(chunk_tokens=33) as engine:
        found = served(engine, requests)
    model = model_of("llama")
    for request, scale, answer in found:
        ids = torch.tensor([request.prompt_ids + answer.tokens])
        engine.extension.set_scale(scale)
        expected = torch.log_softmax(model(ids).logits[0], -1)[len(request.prompt_ids) - 1 : -1]
        engine.extension.set_scale(1.0 if scale > 1 else 8.0)
        wrong = torch.log_softmax(model(ids).logits[0], -1)[len(request.prompt_ids) - 1 : -1]
        tokens, ours = torch.tensor(answer.tokens)[:, None], torch.tensor([one.logprob for one in answer.logprobs])
        torch.testing.assert_close(ours, expected.gather(1, tokens)[:, 0], rtol=0, atol=1e-4)
        if len(request.prompt_ids) > NEIGHBOURS:
            assert (ours - wrong.gather(1, tokens)[:, 0]).abs().max() > 1e-3, "another group would show"


def test_evaluation_may_ask_in_batches() -> None:
    check_batches(Engine(model_of("llama"), None, max_scale=MAX_SCALE))


def test_what_is_not_served() -> None:
    with pytest.raises(ValueError, match=r"method = 'self_extend'.*leave rerotate out"):
        serving(rerotate=True)
    assert model_of("llama").config._attn_implementation == "e2llm_self_extend"


@starts_interpreter
@pytest.mark.timeout(600)
def test_with_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
@pytest.mark.parametrize("model_type", ["llama", "glm", "gemma3_text"])
def test_kernels_change_nothing(model_type: str) -> None:
    options: dict[str, Any] = {"run_ahead": True, "chunk_tokens": 133, "page_tokens": 8}
    with serving(model_type, attention="kernels", **options) as engine:
        requests = mixed_requests()[::3] + LONG_ANSWERS if model_type == "llama" else mixed_requests()[::6]
        found = served(engine, requests)
    check(model_type, found)


@needs_interpreter
def test_one_size_for_every_batch_changes_nothing() -> None:
    with serving(attention="kernels", one_graph=True, max_running=5) as engine:
        found = served(engine, mixed_requests()[::4] + LONG_ANSWERS)
    check("llama", found)
