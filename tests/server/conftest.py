"""One embedded base model for all server tests, engines over it, and apps served on real ports."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.util
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'e2llm[serve]'")

import httpx
import uvicorn
from sequential_engine import SequentialEngine

from e2llm.engine.batch import BatchEngine
from e2llm.infer import Engine
from e2llm.llamacpp.convert import find_gguf
from e2llm.quickstart import TINY
from e2llm.server import ServerSettings, create_app

KV_TOKENS = 16_384


class Served:
    """An app on a port of this machine."""

    def __init__(self, engine: Any, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.app = create_app(engine, settings)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, log_config=None, timeout_graceful_shutdown=settings.shutdown_seconds, access_log=False
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started, 20)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for `condition`; fail the test where it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def base() -> Engine:
    """The reference: what a prompt's answer is, said by the plain engine alone."""
    engine = Engine.load(str(TINY), dtype="float32", device="cpu")
    engine.max_scale = 16.0
    return engine


@pytest.fixture(scope="session")
def twin(base: Engine) -> Engine:
    """The same model once more, for the engines that are served: they run while the reference does."""
    engine = Engine.load(str(TINY), dtype="float32", device="cpu")
    engine.max_scale, engine.tokenizer = 16.0, base.tokenizer
    return engine


def batch_engine(twin: Engine) -> Any:
    """A `BatchEngine` with the sequential engine's `before_step`."""
    engine: Any = BatchEngine(twin.model, twin.tokenizer, max_scale=16.0, kv_tokens=KV_TOKENS)
    engine.before_step = lambda: None
    forward = engine._packed.logits

    def slowed(*arguments: Any) -> Any:
        engine.before_step()
        return forward(*arguments)

    engine._packed.logits = slowed
    return engine


def llamacpp_engine(twin: Engine) -> Any:
    """llama.cpp over the same weights in float32, with the sequential engine's `before_step`."""
    from e2llm.llamacpp import LlamaCppEngine

    engine: Any = LlamaCppEngine(twin_gguf(), max_scale=16.0, kv_tokens=KV_TOKENS)
    engine.tokenizer = twin.tokenizer
    engine.before_step = lambda: None
    compute = engine._compute

    def slowed(*arguments: Any) -> Any:
        engine.before_step()
        return compute(*arguments)

    engine._compute = slowed
    return engine


@functools.cache
def twin_gguf() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="e2llm-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return find_gguf(str(TINY), dtype="float32", cache=folder, tell=lambda line: None)


ENGINES = {"batch": batch_engine, "sequential": SequentialEngine}
if importlib.util.find_spec("llama_cpp") is not None:  # its own environment: scripts/ci_llamacpp.sh
    ENGINES["llamacpp"] = llamacpp_engine


@pytest.fixture
def engine(request: pytest.FixtureRequest, twin: Engine) -> Iterator[Any]:
    """The batching engine; a module may ask for others of `ENGINES` by parametrizing this name indirectly."""
    made = ENGINES[getattr(request, "param", "batch")](twin)
    yield made
    made.close()
    gc.collect()  # its key-value memory hangs in a cycle


@pytest.fixture
def serve(engine: Any) -> Iterator[Callable[..., Served]]:
    """serve(**settings) starts the engine's server; all are stopped after the test."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            served = Served(engine, ServerSettings(model_name="tiny", **settings))
            stack.callback(served.stop)
            return served

        yield start
