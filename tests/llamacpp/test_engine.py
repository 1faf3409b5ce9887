"""What the engine promises beside exact texts: memory inside its budget, cancelling, closing, and what it refuses."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")

from served import GREEDY_ON, collect, make_checkpoint, prompt, static_model, static_tokens

from e2llm.engine.request import RefusedError, Request, Sampling
from e2llm.export import export
from e2llm.llamacpp import LlamaCppEngine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "llama", "yarn")


@pytest.fixture(scope="module")
def file(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as an export of any window, in float32."""
    out = tmp_path_factory.mktemp("export") / "out"
    export(checkpoint, out, to="gguf", gguf_type="f32", verify=False)
    (found,) = out.glob("*.gguf")
    return found


@pytest.fixture
def make(file: Path) -> Iterator[Callable[..., LlamaCppEngine]]:
    made: list[LlamaCppEngine] = []

    def go(**options: Any) -> LlamaCppEngine:
        made.append(LlamaCppEngine(file, **({"kv_tokens": 4096, "threads": 1} | options)))
        return made[-1]

    yield go
    for engine in made:
        engine.close()


def request(tokens: int, new: int = 8, **fields: Any) -> Request:
    return Request(prompt_ids=prompt(tokens, seed=tokens), max_new_tokens=new, **({"sampling": GREEDY_ON} | fields))


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.005)


def test_contexts_stay_inside_the_budget(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make(kv_tokens=1024)
    for length, scales in ((20, {1}), (100, {1, 2}), (200, {1, 2, 4}), (20, {1, 2, 4}), (400, {4, 1, 8})):
        assert collect(engine.submit(request(length)))[1] == "length"
        assert set(engine.contexts()) == scales and sum(engine.contexts().values()) <= 1024
    assert engine.contexts()[8.0] == 512, "what the request needs, above the usual quarter"
    stats = engine.stats()
    assert stats.kv_tokens_used == 0 and stats.kv_tokens_total == 1024 and stats.output_tokens_total == 40
    assert stats.prompt_tokens_total == 740


def test_what_never_fits_is_refused_with_the_numbers(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make(kv_tokens=256)
    with pytest.raises(RefusedError, match=r"prompt \(250\) \+ new tokens \(8\) need a context of 512 .* has 256"):
        engine.submit(request(250))
    collect(engine.submit(request(249)))
    with pytest.raises(RefusedError, match="largest trained window is 512"):
        engine.submit(request(510))
    with pytest.raises(ValueError, match="kv_tokens = 100"):
        make(kv_tokens=100)


def test_more_than_memory_waits_and_all_are_answered(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make(kv_tokens=512)
    requests = [request(n, new=12) for n in (200, 60, 20, 400, 30, 120, 50, 240)] * 3
    streams = [engine.submit(r) for r in requests]
    assert engine.stats().waiting > 0
    found = [collect(stream)[:2] for stream in streams]
    assert all(reason == "length" and len(tokens) == 12 for tokens, reason in found)
    assert found[:8] == found[8:16] == found[16:], "company changes nothing"
    assert sum(engine.contexts().values()) <= 512 and engine.stats().running == 0


def test_cancelling_frees_at_once_and_disturbs_nobody(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    alone = collect(engine.submit(request(30, new=30)))[0]
    before = engine.stats().output_tokens_total
    long, other = engine.submit(request(40, new=400, scale=8.0)), engine.submit(request(30, new=30))
    next(iter(long))
    assert engine.stats().kv_tokens_used > 400
    long.cancel()
    rest = list(long)
    assert rest[-1].finish_reason == "cancelled"
    assert collect(other)[0] == alone
    assert engine.stats().output_tokens_total - before < 150
    waiting = [engine.submit(request(400, new=100, beyond_trained=False)) for _ in range(12)]
    for stream in waiting:
        stream.cancel()
        stream.cancel()
    assert {collect(stream)[1] for stream in waiting} == {"cancelled"}
    until(lambda: engine.stats().kv_tokens_used == engine.stats().running == engine.stats().waiting == 0)


def test_closing(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    stream = engine.submit(request(20, new=40))
    engine.close(drain=True)
    assert collect(stream)[1] == "length"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request(20))
    cut = make()
    stream = cut.submit(request(20, new=480))
    next(iter(stream))
    cut.close()
    assert collect(stream)[1] == "cancelled"
    cut.close()


def test_text_stops_and_ends(file: Path, make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    whole = collect(engine.submit(request(20, new=20)))[0]
    text = engine.tokenizer.decode(whole)
    stop = text[3:6]
    outputs = list(engine.submit(request(20, new=20, sampling=Sampling(stop=(stop,)))))
    assert "".join(o.text for o in outputs) == text[: text.index(stop)] and outputs[-1].finish_reason == "stop"
    engine._ends = frozenset({whole[4]})
    assert collect(engine.submit(request(20, new=20, sampling=Sampling())))[0] == whole[: whole.index(whole[4]) + 1]
    assert collect(engine.submit(request(20, new=20)))[0] == whole, "ignore_eos"


def test_length_without_a_limit(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    stream = engine.submit(Request(prompt_ids=prompt(60), sampling=GREEDY_ON))
    assert stream.admission.max_new_tokens == 452 and stream.admission.scale == 8.0
    assert collect(stream)[1] == "length"


def test_malformed_requests(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    for bad, message in [
        (Request(prompt_ids=()), "prompt is empty"),
        (Request(prompt_ids=(4096,)), "tokens are 0 to 4095"),
        (Request(prompt_ids=(-1,)), "tokens are 0 to 4095"),
        (Request(prompt_ids=(5,), scale=0.5), "scale"),
        (Request(prompt_ids=(5,), max_new_tokens=0), "max_new_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(bad)
    warned = engine.submit(request(20, scale=16.0, beyond_trained=True))
    assert "outside the trained range" in warned.admission.warnings[0]
    assert collect(warned)[1] == "length"


def test_a_pass_that_fails_ends_its_requests_alone(make: Callable[..., LlamaCppEngine]) -> None:
    engine = make()
    compute = engine._compute

    def broken(held: Any, step: Any, asking: Any) -> Any:
        if step[0][0].scale == 2.0:
            raise RuntimeError("a broken kernel")
        return compute(held, step, asking)

    engine._compute = broken  # type: ignore[method-assign]
    good, bad = engine.submit(request(20)), engine.submit(request(100))
    assert collect(bad)[1::2] == ("error", "RuntimeError: a broken kernel")
    assert collect(good)[1] == "length" and engine.stats().kv_tokens_used == 0
    engine._compute = compute  # type: ignore[method-assign]
    assert collect(engine.submit(request(100)))[1] == "length", "the context is fit for use"


def test_a_file_of_one_scale_is_served_as_it_is(here: Path, checkpoint: str) -> None:
    export(checkpoint, "fixed", to="gguf", scale=4, gguf_type="f32", verify=False)
    told: list[str] = []
    with LlamaCppEngine.load("fixed", kv_tokens=1024, threads=1, tell=told.append) as engine:
        assert engine.native_window == 256 and engine.max_scale == 1.0 and "scaled already (yarn, factor 4)" in told[0]
        stream = engine.submit(request(30))
        assert stream.admission.scale == 1.0 and stream.admission.window == 256
        assert collect(stream)[0] == static_tokens(static_model("llama", "yarn", 4.0, None), request(30))
        with pytest.raises(RefusedError, match="are fixed"):
            engine.submit(request(30, scale=2.0))


def test_without_e2llm_json_it_says_what_it_assumes(here: Path, file: Path) -> None:
    (here / "bare.gguf").write_bytes(file.read_bytes())
    told: list[str] = []
    with (
        warnings.catch_warnings(),
        LlamaCppEngine.load("bare.gguf", kv_tokens=1024, threads=1, tell=told.append) as engine,
    ):
        (note,) = told
        assert note.startswith("no e2llm.json beside bare.gguf: assuming method yarn, native window 64")
        assert collect(engine.submit(request(20)))[0] == static_tokens(
            static_model("llama", "yarn", 1.0, None), request(20)
        )
        with pytest.raises(RefusedError, match="largest trained window is 64"):
            engine.submit(request(100))
        longer = engine.submit(request(100, beyond_trained=True))
        assert longer.admission.scale == 2.0
        assert collect(longer)[0] == static_tokens(static_model("llama", "yarn", 2.0, None), request(100))


def test_files_that_are_none(here: Path, file: Path) -> None:
    (here / "bad.gguf").write_bytes(b"not a model at all, and longer than any header could be")
    (here / "cut.gguf").write_bytes(file.read_bytes()[:-50_000])
    for name in ("bad.gguf", "cut.gguf", "none.gguf"):
        with pytest.raises(ValueError, match=name):
            LlamaCppEngine.load(name, kv_tokens=1024, threads=1, tell=lambda line: None)
