"""Every text of a mixed batch is the one that transformers' own static scaling gives that request alone."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from architectures import statically_scaled, tiny_model, with_rope
from batches import (
    BASE,
    GREEDY_ON,
    NO_END,
    STATIC,
    Answer,
    collect,
    expected_tokens,
    in_dtype,
    mixed_requests,
    prompt,
    run,
    static_model,
    tiny_engine,
)

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request, Sampling
from e2llm.hf import install

FAMILIES = ["qwen3", "gemma3_text", "gemma2", "gpt_oss", "gpt_neox", "cohere", "mixtral", "deepseek_v3"]
"""Beside llama: query norms, sliding windows, softcaps, sinks, partial rotary, interleaved, experts, latent keys."""


def check(engine: BatchEngine, model_type: str, method: str, requests: list[Request]) -> None:
    streams = [engine.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        answer = collect(stream)
        assert answer.tokens == expected_tokens(model_type, method, request, stream.admission.scale)
        assert answer.finish_reason == "length"
    scales = {stream.admission.scale for stream in streams}
    assert len(requests) >= 24 and scales == {1.0, 2.0, 3.0, 4.0, 8.0}


def check_memory_is_back(engine: BatchEngine) -> None:
    engine.clear_prefix_cache()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)


@pytest.mark.parametrize("method", sorted(STATIC))
def test_llama(method: str) -> None:
    with tiny_engine("llama", method) as engine:
        check(engine, "llama", method, mixed_requests())
        check_memory_is_back(engine)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type: str) -> None:
    with tiny_engine(model_type, "linear") as engine:
        check(engine, model_type, "linear", mixed_requests())
        check_memory_is_back(engine)


@pytest.mark.parametrize("window", [5, 16, 40])
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_sliding_windows_are_honoured(model_type: str, window: int) -> None:
    model = tiny_model(model_type, sliding_window=window, eos_token_id=None)
    model.generation_config.eos_token_id = None
    twin: Any = statically_scaled(model, rope_type="linear", factor=2.0)
    install(model, method="linear")
    requests = [Request(prompt_ids=prompt(n, n), max_new_tokens=12, scale=2.0) for n in (3, 17, 60, 100)]
    with BatchEngine(model, None, max_scale=8, page_tokens=8, chunk_tokens=29) as engine:
        for request, answer in zip(requests, run(engine, requests), strict=True):
            expected = greedy(twin, request.prompt_ids, 12)
            assert answer.tokens == expected
            assert run(engine, [request])[0].tokens == expected, "alone, where no mask is needed"


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 1},
        {"chunk_tokens": 7, "page_tokens": 4},
        {"chunk_tokens": 64, "page_tokens": 32, "max_running": 5},
        {"page_tokens": 1, "kv_tokens": 700},
        {"page_tokens": 64, "prefix_cache": False, "kv_tokens": 1024},
        {"max_running": 1},
    ],
    ids=str,
)
def test_chunks_pages_and_memory_change_nothing(options: dict[str, Any]) -> None:
    requests = mixed_requests()
    random.Random(0).shuffle(requests)
    with tiny_engine("llama", "yarn", **options) as engine:
        check(engine, "llama", "yarn", requests)
        check_memory_is_back(engine)


def test_repeated_permuted_and_cancelled_batches_change_nothing() -> None:
    order = random.Random(1)
    with tiny_engine("llama", "yarn", chunk_tokens=40, kv_tokens=1600) as engine:
        for _ in range(3):
            requests = mixed_requests()
            order.shuffle(requests)
            streams = [engine.submit(request) for request in requests]
            for stream in order.sample(streams, 8):
                stream.cancel()
            for request, stream in zip(requests, streams, strict=True):
                answer = collect(stream)
                expected = expected_tokens("llama", "yarn", request, stream.admission.scale)
                assert answer.tokens == expected[: len(answer.tokens)]
                assert answer.finish_reason == ("length" if len(answer.tokens) == len(expected) else "cancelled")
        check_memory_is_back(engine)


def test_prefixes_are_shared_within_a_scale_only() -> None:
    with tiny_engine("llama", "linear", page_tokens=16) as engine:
        long = Request(prompt_ids=prompt(120), max_new_tokens=8)
        first = run(engine, [long])[0]
        assert engine.stats().cached_tokens_total == 0
        again = run(engine, [long])[0]
        assert engine.stats().cached_tokens_total == 112, "seven full pages of sixteen"
        other = dataclasses.replace(long, scale=4.0)
        answer = run(engine, [other])[0]
        assert engine.stats().cached_tokens_total == 112, "another scale, other keys"
        assert first.tokens == again.tokens == expected_tokens("llama", "linear", long, 2.0)
        assert answer.tokens == expected_tokens("llama", "linear", other, 4.0)
        # A text that goes on where an answer stopped finds the answer's pages, too.
        follow = Request(prompt_ids=long.prompt_ids + first.tokens + prompt(9), max_new_tokens=8, scale=2.0)
        assert run(engine, [follow])[0].tokens == expected_tokens("llama", "linear", follow, 2.0)
        stats = engine.stats()
        assert stats.cached_tokens_total == 112 + 112
        assert stats.prompt_tokens_total + stats.cached_tokens_total == 3 * 120 + 137


def test_the_same_prompt_many_times_is_read_once() -> None:
    request = Request(prompt_ids=prompt(200), max_new_tokens=4)
    with tiny_engine("llama", "linear", page_tokens=8, chunk_tokens=32) as engine:
        answers = run(engine, [request] * 6)
        assert {answer.tokens for answer in answers} == {expected_tokens("llama", "linear", request, 4.0)}
        stats = engine.stats()
        assert stats.prompt_tokens_total == 200 + 5 * 8 and stats.cached_tokens_total == 5 * 192


def test_embedded_base_at_five_scales() -> None:
    """The base that comes with the package, its text and tokens, against transformers' own YaRN of it."""
    with BatchEngine.load(BASE, method="yarn", max_scale=16.0, device="cpu", chunk_tokens=900) as engine:
        tokenizer = engine.tokenizer
        ids = tokenizer("def area(width, height):\n    return width * height\n\n\n" * 200).input_ids
        lengths = [4, 9, 30, 64, 100, 150, 200, 250, 300, 350, 400, 450, 503, 507, 600, 1030]
        requests = [Request(prompt_ids=tuple(ids[n : 2 * n]), max_new_tokens=8, sampling=GREEDY_ON) for n in lengths]
        requests += [dataclasses.replace(request, scale=s) for request in requests[3:6] for s in (2.0, 8.0, 16.0)]
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
    scales = [stream.admission.scale for stream in streams]
    assert len(requests) >= 24 and set(scales) == {1.0, 2.0, 4.0, 8.0, 16.0}
    for scale in set(scales):
        model = static_base(scale)
        for request, own, answer in zip(requests, scales, answers, strict=True):
            if own == scale:
                assert answer.tokens == greedy(model, request.prompt_ids, 8)
                assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)


def static_base(scale: float) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(BASE)
    if scale > 1:
        config = with_rope(config, rope_type="yarn", factor=scale, original_max_position_embeddings=512)
    return AutoModelForCausalLM.from_pretrained(BASE, config=config, dtype="float32").eval()


@torch.no_grad()
def greedy(model: Any, prompt_ids: tuple[int, ...], new: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt_ids])
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tuple(found[0, len(prompt_ids) :].tolist())


def test_seeds_reproduce_alone_and_in_a_batch() -> None:
    def sampled(seed: int | None, n: int) -> Request:
        sampling = Sampling(temperature=0.8, top_p=0.9 if n % 2 else 1.0, top_k=40 if n % 3 else 0, seed=seed)
        return Request(prompt_ids=prompt(n, n), max_new_tokens=12, sampling=sampling)

    requests = [sampled(n, n) for n in (5, 20, 63, 64, 90, 130, 200, 256)]
    with tiny_engine("llama", "yarn") as engine:
        together = run(engine, requests + [sampled(None, n) for n in (5, 20, 63)])
        alone = [run(engine, [request])[0] for request in reversed(requests)][::-1]
        other = run(engine, [sampled(1000 + n, n) for n in (5, 20, 63, 64)])
    assert [a.tokens for a in together[: len(requests)]] == [a.tokens for a in alone]
    assert all(a.tokens != b.tokens for a, b in zip(other, alone, strict=False)), "another seed, another text"
    assert together[8].tokens != together[0].tokens, "without a seed it is random"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_log_probabilities_equal_static_scaling(dtype: torch.dtype, tolerance: float) -> None:
    """Of every token on the way, mixed scales; tolerance in nats (a wrong scale moves them by 0.3)."""
    model = in_dtype(tiny_model("llama", **NO_END), dtype)
    install(model, method="linear")
    requests = [
        Request(prompt_ids=prompt(n, n), max_new_tokens=6, sampling=Sampling(logprobs=5)) for n in (10, 90, 150, 300)
    ]
    with BatchEngine(model, None, max_scale=8.0, chunk_tokens=33) as engine:
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
    for request, stream, answer in zip(requests, streams, answers, strict=True):
        ids = torch.tensor([request.prompt_ids + answer.tokens])
        static = in_dtype(static_model("llama", "linear", stream.admission.scale), dtype)
        with torch.no_grad():
            expected = torch.log_softmax(static(ids).logits[0].float(), -1)[len(request.prompt_ids) - 1 : -1]
        assert len(answer.logprobs) == 6
        for one, row in zip(answer.logprobs, expected, strict=True):
            assert one.logprob == one.top[0][1] and len(one.top) == 5, "greedy takes the most probable"
            for token, logprob in ((one.token_id, one.logprob), *one.top):
                assert abs(logprob - float(row[token])) < tolerance


def test_bfloat16_logits_of_24_requests_at_five_scales() -> None:
    """Log probabilities of everything the batch wrote, against bfloat16 models that are statically scaled, each
    request alone; tolerance in nats. The same at a wrong scale is off by 0.3."""
    model = in_dtype(tiny_model("llama", **NO_END), torch.bfloat16)
    install(model, method="yarn")
    requests = [dataclasses.replace(r, sampling=Sampling(logprobs=0)) for r in mixed_requests()]
    with BatchEngine(model, None, max_scale=8.0, chunk_tokens=50) as engine:
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
    scales = [stream.admission.scale for stream in streams]
    assert len(requests) >= 24 and set(scales) == {1.0, 2.0, 3.0, 4.0, 8.0}
    statics = {scale: in_dtype(static_model("llama", "yarn", scale), torch.bfloat16) for scale in set(scales)}
    near = [nats_apart(statics[scale], *pair) for scale, *pair in zip(scales, requests, answers, strict=True)]
    assert max(near) < 0.05
    pairs = zip(scales, requests, answers, strict=True)
    wrong = [nats_apart(statics[8.0], *pair) for scale, *pair in pairs if scale < 3]
    assert max(wrong) > 0.2, "the measure would see a wrong scale"


@torch.no_grad()
def nats_apart(static: Any, request: Request, answer: Answer) -> float:
    """Largest difference of the answer's log probabilities from those of `static`, which reads all of it at once."""
    ids = torch.tensor([request.prompt_ids + answer.tokens])
    logs = torch.log_softmax(static(ids).logits[0, len(request.prompt_ids) - 1 : -1].float(), -1)
    found = torch.tensor([one.logprob for one in answer.logprobs])
    return float((logs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0] - found).abs().max())
