"""`e2llm serve`: loads a checkpoint, starts an engine and serves it until it is told to stop.

Flows in: a command line. Flows out: an exit code. No torch, no FastAPI until it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.server import create_app, require_extra
from e2llm.server.settings import KEYS_VARIABLE, ServerSettings, load_api_keys

if TYPE_CHECKING:
    from e2llm.engine.request import ServingEngine

ENGINES = ("e2llm", "vllm", "llamacpp")
_DEFAULTS = ServerSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `e2llm serve`; those of the limits have the names and defaults of `ServerSettings`."""
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, hub name or .gguf file")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for every network (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen at; 0 for any that is free (8000)")
    add("--engine", choices=ENGINES, default="e2llm", help="what runs the model (e2llm)")
    add("--name", help="what clients call the model (the checkpoint's own name)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    add("--kv-gib", type=float, help="memory for keys and values, GiB (default: chosen by the engine)")
    turned = "turn the cached keys of a conversation that outgrows its scale instead of reading it again: approximate"
    add("--rerotate", action="store_true", help=turned)
    add("--vllm-options", metavar="JSON", help="with --engine vllm: further engine arguments of vLLM, an object")
    keys = f"file with one API key a line; also ${KEYS_VARIABLE}, separated by commas (default: no key)"
    add("--api-key-file", metavar="FILE", help=keys)
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    _add(add, "--max-request-bytes", int, "largest request body")
    _add(add, "--max-concurrent", int, "sequences in the engine at once")
    _add(add, "--max-queue", int, "sequences that wait for a place; more get 429")
    _add(add, "--max-choices", int, "answers of one request, prompts × n")
    _add(add, "--max-output-tokens", int, "largest max_tokens of a request")
    _add(add, "--requests-per-minute", float, "for each key, or each address without keys")
    _add(add, "--burst", int, "requests at once before the rate counts")
    _add(add, "--request-timeout-seconds", float, "longest life of a request")
    _add(add, "--shutdown-seconds", float, "time for running answers after SIGTERM")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="page that may call; repeatable (none)")
    add("--log-prompts", action="store_true", help="write prompts into the log")


def _add(add: Any, flag: str, kind: type, text: str) -> None:
    default = getattr(_DEFAULTS, flag[2:].replace("-", "_"))
    shown = "no limit" if default is None else f"{default:g}"
    add(flag, type=kind, default=default, metavar="N" if kind is int else "X", help=f"{text} ({shown})")


def settings_of(arguments: argparse.Namespace) -> ServerSettings:
    """Settings as asked for. Raises ValueError for values that make no sense and for keys that cannot be read."""
    names = ("max_request_bytes", "max_concurrent", "max_queue", "max_choices", "max_output_tokens", "burst")
    more = ("requests_per_minute", "request_timeout_seconds", "shutdown_seconds", "log_prompts")
    if not 0 <= arguments.port <= 65535:
        raise ValueError(f"port = {arguments.port}: use 0 to 65535")
    return ServerSettings(
        model_name=arguments.name or Path(arguments.checkpoint).name or arguments.checkpoint,
        api_keys=load_api_keys(arguments.api_key_file, os.environ),
        cors_origins=tuple(arguments.cors_origin),
        **{name: getattr(arguments, name) for name in (*names, *more)},
    )


def load_engine(arguments: argparse.Namespace) -> ServingEngine:
    """The engine that was asked for, with its thread running. Raises ValueError for one that is not here."""
    if arguments.kv_gib is not None and not arguments.kv_gib > 0:
        raise ValueError(f"kv-gib = {arguments.kv_gib}: use more than 0, or leave it out")
    if arguments.vllm_options is not None and arguments.engine != "vllm":
        raise ValueError(f"vllm-options with --engine {arguments.engine}: they are vLLM's own; leave them out")
    if arguments.rerotate and arguments.engine != "e2llm":
        raise ValueError(f"rerotate with --engine {arguments.engine}: it reads a conversation again; leave it out")
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "kv_bytes": None if arguments.kv_gib is None else int(arguments.kv_gib * 2**30),
        "max_running": arguments.max_concurrent,
    }
    if arguments.engine == "vllm":
        from e2llm.vllm_plugin import load_engine as load_vllm

        served: ServingEngine = load_vllm(arguments.checkpoint, **options, options=arguments.vllm_options)
        return served
    if arguments.engine == "llamacpp":
        from e2llm.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine.load(arguments.checkpoint, **options)
    from e2llm.engine.batch import BatchEngine

    engine = BatchEngine.load(arguments.checkpoint, **options, rerotate=arguments.rerotate)
    if engine.info is None:
        from e2llm.hf.checkpoint import assumed_without_info

        note = assumed_without_info(arguments.checkpoint, engine.extension.method, engine.native_window)
        print(note, file=sys.stderr)
    return engine


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; then running answers get `shutdown_seconds` to end."""
    require_extra()
    settings = settings_of(arguments)
    engine = load_engine(arguments)
    try:
        return serve(engine, settings, arguments.host, arguments.port)
    finally:
        engine.close()


def serve(engine: ServingEngine, settings: ServerSettings, host: str, port: int) -> int:
    """Listen until told to stop. Exit code 0, or 1 where the address cannot be had."""
    import uvicorn

    from e2llm.server.logs import LOGGER, configure_logging

    configure_logging(sys.stderr)
    if not settings.api_keys and host not in {"127.0.0.1", "localhost", "::1"}:
        LOGGER.warning("open to the network without API keys", extra={"fields": {"host": host}})
    config = uvicorn.Config(
        create_app(engine, settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whole seconds; uvicorn reads 0 as "no limit".
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
    )
    server = uvicorn.Server(config)
    largest = int(engine.native_window * engine.max_scale)
    facts = {"model": settings.model_name, "url": f"http://{host}:{port}", "engine": engine.name, "max_window": largest}
    LOGGER.info("serving", extra={"fields": facts})
    with _stopped_by_signals():
        server.run()
    return 0 if server.started else 1


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done: that must not end the process before the
    engine is closed."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
