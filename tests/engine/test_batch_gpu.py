"""What only a CUDA device can show: `pytest -m gpu tests/engine/test_batch_gpu.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_model
from batches import NO_END, STATIC, collect, in_dtype, mixed_requests, prompt

from e2llm.engine import forward as forward_module
from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request, Sampling
from e2llm.hf import install

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


CASES = [(m, d) for m in ("llama", "gemma2", "gemma3_text") for d in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [("gpt_oss", torch.float32)]
"""In low precision a router of experts sends single tokens elsewhere."""


def on_device(plain: Any, dtype: torch.dtype) -> Any:
    """The same weights in `dtype`; those of `plain` are rounded to it, and stay float32."""
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return in_dtype(plain, dtype).to("cuda")


@pytest.mark.parametrize(
    "options", [{}, {"chunk_tokens": 32, "page_tokens": 32}, {"graphs": False}, {"attention": "plain"}], ids=str
)
@pytest.mark.parametrize(("model_type", "dtype"), CASES)
def test_log_probabilities_equal_static_scaling(model_type: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """27 requests at five scales in one batch, whole prompts and pieces, against the static model on the CPU in
    float32; tolerance in nats (a wrong scale moves a tiny model's by 0.3)."""
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    plain: Any = tiny_model(model_type, **NO_END)
    requests = [
        Request(prompt_ids=r.prompt_ids, max_new_tokens=6, scale=r.scale, sampling=Sampling(logprobs=0))
        for r in mixed_requests()
    ]
    model = on_device(plain, dtype)
    install(model, method="linear")
    with BatchEngine(model, None, max_scale=8.0, **options) as engine:
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0
    static = {g: statically_scaled(plain, factor=g, **STATIC["linear"]) for g in (1.0, 2.0, 3.0, 4.0, 8.0)}
    for request, stream, answer in zip(requests, streams, answers, strict=True):
        assert answer.finish_reason == "length", answer.error
        ids = torch.tensor([request.prompt_ids + answer.tokens])
        with torch.no_grad():
            logits = static[stream.admission.scale](ids).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        found = torch.tensor([one.logprob for one in answer.logprobs])
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"chunk_tokens": 32, "page_tokens": 32}, {"graphs": False}, {"attention": "plain"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "glm"])
def test_log_probabilities_in_groups(model_type: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Method self_extend: 27 requests in five groups in one batch, against the model's own attention on the CPU in
    float32, one text at a time."""
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    plain: Any = tiny_model(model_type, **NO_END)
    requests = [
        Request(prompt_ids=r.prompt_ids, max_new_tokens=6, scale=r.scale, sampling=Sampling(logprobs=0))
        for r in mixed_requests()
    ]
    model = on_device(plain, dtype)
    groups: dict[str, Any] = {"method": "self_extend", "native_window": WINDOW, "neighbours": 22}
    install(model, **groups)
    with BatchEngine(model, None, max_scale=8.0, **options) as engine:
        if not options:
            assert engine.stats().attention == "kernels, recorded in CUDA graphs"
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0
    own = install(plain, **groups)
    for request, stream, answer in zip(requests, streams, answers, strict=True):
        assert answer.finish_reason == "length", answer.error
        own.set_scale(stream.admission.scale)
        with torch.no_grad():
            logits = plain(torch.tensor([request.prompt_ids + answer.tokens])).logits[0]
        expected = torch.log_softmax(logits[len(request.prompt_ids) - 1 : -1], -1)
        expected = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        found = torch.tensor([one.logprob for one in answer.logprobs])
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_recorded_steps_give_the_texts_of_the_plain_path() -> None:
    """Batches of every size that is recorded, some with empty places, again and again; requests come and go between."""
    requests = [dataclasses.replace(r, sampling=Sampling(logprobs=0)) for r in mixed_requests()]
    plain: Any = tiny_model("llama", **NO_END)
    install(plain.to("cuda"), method="linear")
    with BatchEngine(plain, None, max_scale=8.0, attention="plain", run_ahead=False) as engine:
        expected = [collect(engine.submit(request)) for request in requests]
    with BatchEngine(plain, None, max_scale=8.0) as engine:
        assert engine.stats().attention == "kernels, recorded in CUDA graphs"
        for count in (1, 2, 3, 5, 9, 20, 27, 4, 1, 27):
            streams = [engine.submit(request) for request in requests[:count]]
            for stream, alone in zip(streams, expected, strict=False):
                answer = collect(stream)
                assert answer.tokens == alone.tokens, answer.error
                pairs = zip(answer.logprobs, alone.logprobs, strict=True)
                assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 2e-3
        runner = engine._forward._runner
        assert runner is not None and len(runner.recorded) >= 4
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0
    with BatchEngine(plain, None, max_scale=8.0, max_running=9, one_graph=True) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [collect(stream).tokens for stream in streams] == [alone.tokens for alone in expected]
        runner = engine._forward._runner
        assert runner is not None and runner.recorded == [9]


def test_a_request_longer_than_the_tables_records_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "TABLE_PAGES", 1)
    model: Any = tiny_model("llama", **NO_END)
    install(model.to("cuda"), method="linear")
    requests = [Request(prompt_ids=prompt(n, n), max_new_tokens=6, beyond_trained=True) for n in (60, 300, 60)]
    with BatchEngine(model, None, max_scale=2.0, attention="plain", kv_tokens=1024) as engine:
        expected = [collect(engine.submit(request)) for request in requests]
    with BatchEngine(model, None, max_scale=2.0, kv_tokens=1024) as engine:
        assert [collect(engine.submit(request)) for request in requests] == expected


def test_running_out_of_memory_ends_a_request_and_not_the_engine() -> None:
    model = on_device(tiny_model("llama", **NO_END), torch.bfloat16)
    install(model)
    with BatchEngine(model, None, max_scale=8.0) as engine:
        forward = engine._packed.logits

        def too_large(*arguments: Any) -> torch.Tensor:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return forward(*arguments)

        engine._packed.logits = too_large  # type: ignore[method-assign]
        failed = collect(engine.submit(Request(prompt_ids=prompt(40), max_new_tokens=4)))
        assert failed.finish_reason == "error" and "OutOfMemoryError" in str(failed.error)
        engine._packed.logits = forward  # type: ignore[method-assign]
        assert collect(engine.submit(Request(prompt_ids=prompt(40), max_new_tokens=4))).finish_reason == "length"
