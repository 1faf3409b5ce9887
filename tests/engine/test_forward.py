"""Other ways through the same steps: one queued ahead of the last one's tokens, and kernels; nobody's text changes."""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import pytest
import torch
from architectures import tiny_model
from batches import NO_END, collect, expected_tokens, mixed_requests, prompt, run, tiny_engine
from interpreted import needs_interpreter, run_interpreted, starts_interpreter
from texts import character_tokenizer

from e2llm.engine import forward as forward_module
from e2llm.engine.batch import BatchEngine
from e2llm.engine.forward import choose_attention
from e2llm.engine.request import Request, Sampling
from e2llm.hf import install
from e2llm.hf.decode_runner import batch_sizes


def check(engine: BatchEngine, model_type: str, method: str, requests: list[Request]) -> None:
    """Everybody's text, and memory back at the end."""
    streams = [engine.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        expected = expected_tokens(model_type, method, request, stream.admission.scale)
        answer = collect(stream)
        assert (answer.tokens, answer.finish_reason) == (expected, "length"), answer.error
    engine.clear_prefix_cache()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 7, "page_tokens": 4}, {"kv_tokens": 700}], ids=str)
def test_running_ahead_changes_nothing(options: dict[str, int]) -> None:
    with tiny_engine("llama", "yarn", run_ahead=True, **options) as engine:
        for seed in range(2):
            requests = mixed_requests()
            random.Random(seed).shuffle(requests)
            check(engine, "llama", "yarn", requests)
        assert engine.stats().output_tokens_total == 2 * sum(r.max_new_tokens or 0 for r in requests)


def test_running_ahead_past_an_end_of_text() -> None:
    """The step behind the end was queued already: it is nobody's, and its pages belong to others by then."""
    request = Request(prompt_ids=prompt(30), max_new_tokens=12)
    tokens = expected_tokens("llama", "yarn", request, 1.0)
    model = tiny_model("llama", **NO_END)
    model.generation_config.eos_token_id = [tokens[5]]
    install(model)
    end = tokens.index(tokens[5])
    with BatchEngine(model, None, max_scale=8.0, run_ahead=True, kv_tokens=64, prefix_cache=False) as engine:
        answers = run(engine, [request] * 5)
    assert [(a.tokens, a.finish_reason) for a in answers] == [(tokens[: end + 1], "stop")] * 5


def test_running_ahead_past_a_stop_string_and_sampling() -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5, logprobs=2)
    plain = Request(prompt_ids=prompt(70), max_new_tokens=20, sampling=sampling)
    with tiny_engine(tokenizer=character_tokenizer()) as engine:
        expected = run(engine, [plain])[0]
    stop = expected.text[4:6]
    stopped = Request(
        prompt_ids=prompt(70), max_new_tokens=20, sampling=Sampling(temperature=0.8, top_p=0.9, seed=5, stop=(stop,))
    )
    with tiny_engine(tokenizer=character_tokenizer(), run_ahead=True) as engine:
        assert run(engine, [plain]) == [expected]
        again, cut = run(engine, [plain, stopped])
        assert again.tokens == expected.tokens
        assert cut.text == expected.text[: expected.text.index(stop)] and cut.finish_reason == "stop"


def test_running_ahead_beside_those_who_vanish() -> None:
    order = random.Random(1)
    with tiny_engine("llama", "yarn", run_ahead=True, chunk_tokens=40, kv_tokens=1600) as engine:
        requests = mixed_requests()
        streams = [engine.submit(request) for request in requests]
        gone = order.sample(streams, 8)
        first = next(gone[0])
        for stream in gone:
            stream.cancel()
        for request, stream in zip(requests, streams, strict=True):
            answer = collect(stream)
            expected = expected_tokens("llama", "yarn", request, stream.admission.scale)
            seen = len(first.token_ids) if stream is gone[0] else 0
            assert answer.tokens == expected[seen : seen + len(answer.tokens)]
            assert answer.finish_reason == "length" or stream in gone
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0


def test_running_ahead_and_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt_ids=prompt(100), max_new_tokens=8)
    with tiny_engine(run_ahead=True) as engine:
        expected = run(engine, [request])[0]
        forward, calls = engine._packed.logits, []

        def fails_once(*arguments: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*arguments)

        monkeypatch.setattr(engine._packed, "logits", fails_once)
        failed = run(engine, [request])[0]
        assert (failed.finish_reason, failed.error) == ("error", "OutOfMemoryError: out of memory")
        assert failed.tokens == expected.tokens[: len(failed.tokens)] and len(failed.tokens) in (1, 2)
        assert run(engine, [request])[0] == expected
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0


@pytest.mark.parametrize("drain", [False, True])
def test_closing_with_a_step_on_its_way(drain: bool) -> None:
    engine = tiny_engine(max_running=2, run_ahead=True)
    streams = [engine.submit(Request(prompt_ids=prompt(40, n), max_new_tokens=20)) for n in range(5)]
    next(streams[0])
    engine.close(drain=drain)
    assert {collect(s).finish_reason for s in streams} == ({"length"} if drain else {"cancelled"})


def test_the_path_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu) == choose_attention("plain", cuda) == "plain"
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"pip install triton, or give attention='plain'"):
        choose_attention("auto", cuda)
    with pytest.raises(ValueError, match="attention = 'fast'"):
        choose_attention("fast", cpu)  # type: ignore[arg-type]
    caplog.set_level(logging.INFO, logger="e2llm")
    with tiny_engine() as engine:
        assert engine.stats().attention == "plain (keys gathered for each request)"
    assert "decoding of llama on cpu: plain" in caplog.text


def test_batch_sizes_rise_to_the_largest() -> None:
    assert batch_sizes(1) == [1] and batch_sizes(5) == [1, 2, 4, 5] and batch_sizes(300)[-2:] == [256, 300]
    for most in range(1, 700):
        sizes = batch_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


@starts_interpreter
@pytest.mark.timeout(600)
def test_with_kernels_interpreted() -> None:
    run_interpreted(__file__)


@needs_interpreter
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_kernels_change_nothing(model_type: str) -> None:
    """Softcaps, sinks, windows, latent keys; batches between two sizes leave places empty."""
    requests = mixed_requests()[:: 3 if model_type == "llama" else 6]
    options: dict[str, Any] = {"run_ahead": True, "chunk_tokens": 133, "page_tokens": 8}
    with tiny_engine(model_type, "linear", attention="kernels", **options) as engine:
        assert engine.stats().attention == "kernels, not recorded (not asked for)"
        check(engine, model_type, "linear", requests)


@needs_interpreter
def test_one_size_for_every_batch_changes_nothing() -> None:
    requests = mixed_requests()[::4]
    with tiny_engine("llama", "linear", attention="kernels", one_graph=True, max_running=5) as engine:
        check(engine, "llama", "linear", requests)
        runner = engine._forward._runner
        assert runner is not None and list(runner._batches) == [5]


@needs_interpreter
def test_kernels_at_a_sliding_window_and_past_the_expected_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "TABLE_PAGES", 1)
    model = tiny_model("mistral", sliding_window=24, eos_token_id=None)
    model.generation_config.eos_token_id = None
    install(model, method="linear")
    requests = [Request(prompt_ids=prompt(n, n), max_new_tokens=4, beyond_trained=True) for n in (3, 60, 300)]
    with BatchEngine(model, None, max_scale=2, attention="plain", kv_tokens=1024) as engine:
        expected = run(engine, requests)
    with BatchEngine(model, None, max_scale=2, attention="kernels", kv_tokens=1024) as engine:
        table = engine._forward._tables
        assert table is not None and table.table.shape[1] == 8
        assert run(engine, requests) == expected
        assert table.table.shape[1] > 8
