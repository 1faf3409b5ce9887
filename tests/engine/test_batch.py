"""What a request may ask, what ends it, and what the engine does when something goes wrong."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, WINDOW, tiny_model, token_ids
from batches import MAX_SCALE, NO_END, Answer, collect, expected_tokens, prompt, run, tiny_engine
from texts import character_tokenizer

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Output, RefusedError, Request, Sampling
from e2llm.hf import get_extension, install
from e2llm.infer import end_tokens
from e2llm.positions.choose import Step


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(chr(token) for token in tokens)


def test_admission_says_what_was_fixed() -> None:
    with tiny_engine() as engine:
        assert (engine.name, engine.native_window, engine.max_scale) == ("e2llm", 64, 8.0)
        admission = engine.submit(Request(prompt_ids=prompt(100), max_new_tokens=28)).admission
        assert (admission.scale, admission.window, admission.prompt_tokens) == (2.0, 128, 100)
        assert (admission.max_new_tokens, admission.warnings) == (28, ())
        assert engine.submit(Request(prompt_ids=prompt(100))).admission.max_new_tokens == 412, "512 in all"
        given = engine.submit(Request(prompt_ids=prompt(100), max_new_tokens=28, scale=1.0)).admission
        assert given.scale == 1.0 and "past the window" in given.warnings[0]


@pytest.mark.parametrize(
    ("request_options", "named"),
    [
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"prompt_ids": (VOCABULARY,)}, "prompt_ids"),
        ({"prompt_ids": (-1,)}, "prompt_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"scale": 0.5}, "scale"),
        ({"sampling": Sampling(stop=("x",))}, "stop"),
    ],
)
def test_nonsense_is_refused(request_options: dict[str, Any], named: str) -> None:
    with tiny_engine() as engine, pytest.raises(ValueError, match=named):
        engine.submit(Request(**({"prompt_ids": prompt(5)} | request_options)))


def test_too_long_is_refused_with_the_numbers() -> None:
    with tiny_engine(kv_tokens=640, page_tokens=16) as engine:
        with pytest.raises(RefusedError, match=r"\(510\) \+ new tokens \(3\) = 513 tokens: .* 512 tokens"):
            engine.submit(Request(prompt_ids=prompt(510), max_new_tokens=3))
        with pytest.raises(RefusedError, match="largest trained window"):
            engine.submit(Request(prompt_ids=prompt(512)))
        with pytest.raises(RefusedError, match="need 656 key-value slots: this engine has 640"):
            engine.submit(Request(prompt_ids=prompt(600), max_new_tokens=42, beyond_trained=True))
        allowed = Request(prompt_ids=prompt(600), max_new_tokens=41, beyond_trained=True)  # the last needs no slot
        stream = engine.submit(allowed)
        assert "was never trained" in stream.admission.warnings[0] and stream.admission.scale == 16.0
        assert collect(stream).tokens == expected_tokens("llama", "yarn", allowed, 16.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_tokens": 0}, "page_tokens"),
        ({"max_running": 0}, "max_running"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"kv_tokens": 15}, "kv_tokens"),
        ({"kv_bytes": 100}, "kv_bytes"),
        ({"kv_tokens": 64, "kv_bytes": 10**6}, "one of them"),
    ],
)
def test_impossible_engines_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_engine(**options)


def test_an_engine_that_is_refused_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_model("llama", **NO_END)
    own = model.config._attn_implementation
    with pytest.raises(ValueError, match="kv_tokens"):
        BatchEngine(model, None, kv_tokens=1)
    assert model.config._attn_implementation == own


def test_stateful_models_are_refused() -> None:
    model = tiny_model("lfm2", **NO_END)
    model._is_stateful = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'lfm2' .* infer.Engine"):
        BatchEngine(model, None)


def test_memory_is_what_was_asked_for() -> None:
    with tiny_engine(kv_tokens=100, page_tokens=16) as engine:
        assert engine.stats().kv_tokens_total == 96
    with tiny_engine(kv_bytes=512 * 16 * 9 + 511, page_tokens=16) as engine:  # 2 layers · 2 heads · 2 · 16 · 4 bytes
        assert engine.stats().kv_tokens_total == 16 * 9
        held = sum(layer.nbytes for layer in engine._store.layers.values())
        assert held == 512 * 16 * 10, "and the page of zeros"


def test_a_request_waits_for_memory_and_a_shorter_one_passes_it() -> None:
    with tiny_engine(kv_tokens=192, page_tokens=16, prefix_cache=False) as engine:
        first = engine.submit(Request(prompt_ids=prompt(100), max_new_tokens=60))  # ten pages of twelve
        second = engine.submit(Request(prompt_ids=prompt(90), max_new_tokens=6))
        third = engine.submit(Request(prompt_ids=prompt(5), max_new_tokens=4))
        assert [len(collect(third).tokens), engine.stats().waiting] == [4, 1]
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (1, 1, 160)
        assert [collect(s).finish_reason for s in (first, second)] == ["length"] * 2
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
        assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.output_tokens_total) == (195, 0, 70)


def test_the_prefix_cache_gives_way_to_requests() -> None:
    with tiny_engine(kv_tokens=320, page_tokens=16) as engine:
        for seed in range(6):
            request = Request(prompt_ids=prompt(200, seed), max_new_tokens=20)
            assert run(engine, [request])[0].tokens == expected_tokens("llama", "yarn", request, 4.0)
            assert engine.stats().kv_tokens_used <= 320
        assert engine.stats().kv_tokens_used > 200


def test_a_short_request_is_not_held_up_by_a_long_one() -> None:
    with tiny_engine(chunk_tokens=8) as engine:
        long = engine.submit(Request(prompt_ids=prompt(500), max_new_tokens=4))
        short = engine.submit(Request(prompt_ids=prompt(12), max_new_tokens=8))
        collect(short)
        next(long)
        assert short.made_at < long.made_at, "its last token was there before the long one's first"
        assert collect(long).finish_reason == "length"


def test_end_of_text_and_ignoring_it() -> None:
    request = Request(prompt_ids=prompt(30), max_new_tokens=12)
    tokens = expected_tokens("llama", "yarn", request, 1.0)
    model = tiny_model("llama", **NO_END)
    model.generation_config.eos_token_id = [tokens[5], VOCABULARY - 1]
    install(model)
    with BatchEngine(model, None, max_scale=8.0) as engine:
        end = tokens.index(tokens[5])
        assert run(engine, [request])[0] == Answer(tokens[: end + 1], "", "stop", (), None)
        going_on = Request(prompt_ids=request.prompt_ids, max_new_tokens=12, sampling=Sampling(ignore_eos=True))
        assert run(engine, [going_on])[0] == Answer(tokens, "", "length", (), None)


def test_end_tokens_come_from_the_generation_config_then_the_tokenizer() -> None:
    model: Any = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, character_tokenizer()) == {5, 6}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, character_tokenizer()) == {2} and end_tokens(model, None) == frozenset()


def test_stop_strings_end_the_text_before_them() -> None:
    request = Request(prompt_ids=prompt(30), max_new_tokens=20)
    tokens = expected_tokens("llama", "yarn", request, 1.0)
    text = text_of(tokens)
    stop = text[9:12]
    with tiny_engine(tokenizer=character_tokenizer()) as engine:
        sampling = Sampling(stop=("\0never", stop))
        outputs = list(engine.submit(Request(prompt_ids=request.prompt_ids, max_new_tokens=20, sampling=sampling)))
        found = text.index(stop)
        assert "".join(o.text for o in outputs) == text[:found] and outputs[-1].finish_reason == "stop"
        assert sum(len(o.token_ids) for o in outputs) == found + 3
        assert run(engine, [request])[0].text == text


def test_cancelling_frees_memory_at_once_and_changes_nobody() -> None:
    with tiny_engine(prefix_cache=False, max_running=2) as engine:
        stays = Request(prompt_ids=prompt(40), max_new_tokens=60)
        streams = [engine.submit(Request(prompt_ids=prompt(50), max_new_tokens=400)) for _ in range(2)]
        waiting = engine.submit(Request(prompt_ids=prompt(9), max_new_tokens=400))
        after = engine.submit(stays)
        next(streams[0])
        for stream in (waiting, streams[0], streams[0]):
            canceller = threading.Thread(target=stream.cancel)
            canceller.start()
            canceller.join()
        assert collect(waiting) == Answer((), "", "cancelled", (), None)
        assert list(streams[0])[-1].finish_reason == "cancelled"
        assert list(streams[0]) == [], "an ended stream stays ended"
        streams[1].cancel()
        assert collect(after).tokens == expected_tokens("llama", "yarn", stays, 2.0)
        wait_until(lambda: engine.stats().kv_tokens_used == 0)
        after.cancel()  # long done


def test_a_failing_forward_ends_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt_ids=prompt(100), max_new_tokens=8)
    with tiny_engine() as engine:
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
        assert failed.tokens == expected.tokens[:2]
        assert run(engine, [request])[0] == expected, "and the next one is served"
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0


def test_logits_that_are_no_numbers_end_their_request_and_leave_no_trace() -> None:
    bad, good = (
        Request(prompt_ids=(7, *prompt(60)), max_new_tokens=30),
        Request(prompt_ids=prompt(50), max_new_tokens=14),
    )
    with tiny_engine(kv_tokens=192, page_tokens=16) as engine:
        embedding = engine.model.get_input_embeddings()
        kept = embedding.weight[7].clone()
        with torch.no_grad():
            embedding.weight[7] = float("nan")
        first, second = run(engine, [bad, good])
        assert (first.finish_reason, first.tokens) == ("error", ()) and "NaN" in str(first.error)
        assert second.tokens == expected_tokens("llama", "yarn", good, 1.0), "its neighbour is served"
        with torch.no_grad():
            embedding.weight[7] = kept
        for seed in range(6):  # beside what the broken keys left in every page
            request = Request(prompt_ids=prompt(17, seed), max_new_tokens=4)
            assert run(engine, [request])[0].tokens == expected_tokens("llama", "yarn", request, 1.0)
        assert run(engine, [bad])[0].tokens == expected_tokens("llama", "yarn", bad, 2.0)


def test_a_broken_engine_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine()
    monkeypatch.setattr(engine, "_drop_cancelled", lambda: 1 / 0)
    assert collect(engine.submit(Request(prompt_ids=prompt(5), max_new_tokens=4))).finish_reason == "error"
    with pytest.raises(RuntimeError, match="has failed: ZeroDivisionError"):
        engine.submit(Request(prompt_ids=prompt(5)))
    engine.close()
    assert "thread ended" in caplog.text


@pytest.mark.parametrize("drain", [False, True])
def test_close(drain: bool) -> None:
    engine = tiny_engine(max_running=2)
    model, own = engine.model, engine._packed._own_attention
    streams = [engine.submit(Request(prompt_ids=prompt(40, n), max_new_tokens=20)) for n in range(5)]
    engine.close(drain=drain)
    assert not engine._worker.is_alive()
    assert {collect(s).finish_reason for s in streams} == ({"length"} if drain else {"cancelled"})
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(prompt_ids=prompt(5)))
    engine.close()
    extension = get_extension(model)
    assert model.config._attn_implementation == own and extension is not None and extension.scale is None
    assert torch.isfinite(model(torch.tensor([prompt(9)])).logits).all(), "the model is its own again"


def test_a_drain_can_be_cut_short() -> None:
    engine = tiny_engine()
    stream = engine.submit(Request(prompt_ids=prompt(40), max_new_tokens=470))
    closing = threading.Thread(target=engine.close, kwargs={"drain": True})
    closing.start()
    next(stream)
    engine.close()
    closing.join(10)
    assert collect(stream).finish_reason == "cancelled"


def test_the_worker_uses_as_many_threads_as_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP would give a new thread every core, whatever torch says there."""
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: said.append((threading.current_thread().name, n)))
    tiny_engine().close()
    assert said == [("e2llm-batch-engine", torch.get_num_threads())]


def test_many_threads_submit_and_vanish() -> None:
    """Some read all, some stop in the middle, some never read; nobody gets another's text."""
    requests = [Request(prompt_ids=prompt(10 + 7 * n, n), max_new_tokens=10) for n in range(24)]
    wrong: list[int] = []

    def client(n: int) -> None:
        stream = engine.submit(requests[n])
        expected = expected_tokens("llama", "yarn", requests[n], stream.admission.scale)
        outputs: list[Output] = []
        for output in stream:
            outputs.append(output)
            if n % 4 == 1 and len(outputs) == 3:
                stream.cancel()
                return
            if n % 4 == 2:
                return stream.cancel()
        if tuple(t for o in outputs for t in o.token_ids) != expected:
            wrong.append(n)

    for request in requests:  # what is expected is made before the threads begin
        for scale in (1.0, 2.0, 4.0):
            expected_tokens("llama", "yarn", request, scale)
    with tiny_engine(kv_tokens=1024, max_running=8) as engine:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
        engine.clear_prefix_cache()
        assert not wrong and engine.stats().kv_tokens_used == 0


def test_a_calibrated_schedule_is_served() -> None:
    model = tiny_model("llama")
    install(model, method="yarn").schedule = (Step(WINDOW, 1.0), Step(4 * WINDOW, 3.0))
    with BatchEngine(model, None, max_scale=MAX_SCALE) as engine:
        ids = tuple(token_ids(1, WINDOW + 10)[0].tolist())
        stream = engine.submit(Request(prompt_ids=ids, max_new_tokens=2))
        assert (stream.admission.scale, stream.admission.window) == (3.0, 4 * WINDOW)
        assert collect(stream).finish_reason == "length"
