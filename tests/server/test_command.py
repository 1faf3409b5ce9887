"""`e2llm serve`: options, keys, what is missing, and a process that serves and stops as it is told."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys

import httpx
import pytest

from e2llm.quickstart import TINY
from e2llm.server import ServerSettings
from e2llm.server.command import add_arguments, load_engine, run, settings_of
from e2llm.server.settings import KEYS_VARIABLE, load_api_keys

COMMAND = """
import argparse, sys
from e2llm.server.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(TINY), *arguments])


def test_defaults_are_those_of_the_settings(monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert settings_of(parse()) == ServerSettings(model_name="tiny-512")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (("--max-concurrent", "0"), "max_concurrent"),
        (("--max-queue", "-1"), "max_queue"),
        (("--requests-per-minute", "nan"), "requests_per_minute"),
        (("--request-timeout-seconds", "0"), "request_timeout_seconds"),
        (("--request-timeout-seconds", "inf"), "request_timeout_seconds"),
        (("--shutdown-seconds", "-1"), "shutdown_seconds"),
        (("--max-output-tokens", "0"), "max_output_tokens"),
        (("--max-request-bytes", "0"), "max_request_bytes"),
        (("--port", "70000"), "port"),
        (("--name", " "), "model_name"),
        (("--api-key-file", "/no/such/file"), "api-key-file"),
        (("--kv-gib", "0"), "kv-gib"),
        (("--engine", "vllm"), "engine"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_read(monkeypatch, bad, field):
    monkeypatch.setattr("e2llm.engine.batch.load_model", None)
    with pytest.raises(ValueError, match=re.escape(field)):
        run(parse(*bad))


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key  # for Ann\n\nsecond-key\nfirst-key\n")
    assert load_api_keys(str(file), {KEYS_VARIABLE: "third-key, "}) == ("third-key", "first-key", "second-key")
    assert load_api_keys(None, {}) == ()
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        load_api_keys(str(file), {KEYS_VARIABLE: "third-key"})
    with pytest.raises(ValueError, match="fewer than 8") as short:
        ServerSettings(api_keys=("abc",))
    assert "abc" not in str(short.value)
    assert "first-key" not in repr(ServerSettings(api_keys=("first-key",)))


@pytest.mark.parametrize("missing", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra_the_install_line_is_said(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import argparse
from e2llm.server.command import add_arguments, run
assert "torch" not in sys.modules
parser = argparse.ArgumentParser()
add_arguments(parser)
try:
    run(parser.parse_args(["somewhere"]))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"{missing} is not installed: pip install 'e2llm[serve]'", done.stderr


def test_a_process_serves_and_stops_when_told():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(TINY), "--port", "0", "--device", "cpu", "--kv-gib", "0.1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = []
        port = None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
                break
        assert port, lines
        body = {"prompt": "def add(a, b):", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        rest = process.stderr.read()
        logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        assert any(line["event"] == "request" and line.get("output_tokens") == 200 for line in logged), rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_load_engine_says_what_is_not_here():
    with pytest.raises(ValueError, match=r"pip install 'e2llm\[llamacpp\]'"):
        load_engine(parse("--engine", "llamacpp"))


@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_keys_are_turned_by_our_own_engine_only(engine):
    with pytest.raises(ValueError, match=f"rerotate with --engine {engine}: .*leave it out"):
        load_engine(parse("--engine", engine, "--rerotate"))


def test_rerotate_reaches_the_engine():
    from e2llm.engine import Request

    shared = tuple(range(5, 205))
    turned = {}
    for flags in ((), ("--rerotate",)):
        engine = load_engine(parse("--kv-gib", "0.05", *flags))
        try:
            for scale in (1.0, 2.0):  # the same beginning, at the next scale
                for _ in engine.submit(Request(prompt_ids=shared, max_new_tokens=2, scale=scale, beyond_trained=True)):
                    pass
            turned[flags] = engine.stats().turned_tokens_total
        finally:
            engine.close()
    assert turned[()] == 0 < turned["--rerotate",]
