"""The commands over this engine, each in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from e2llm.infer import Engine
from e2llm.quickstart import TINY

E2LLM = [sys.executable, "-W", "ignore", "-m", "e2llm.cli"]
FLOAT32 = ["--engine", "llamacpp", "--dtype", "float32", "--kv-gib", "0.1"]
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def expected() -> str:
    return Engine.load(str(TINY), dtype="float32", device="cpu").generate(PROMPT, max_new_tokens=20).text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_chat(here: Path, expected: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")
    options = ["--raw", "--temperature", "0", "--max-new-tokens", "20"]
    done = subprocess.run(
        [*E2LLM, "chat", str(TINY), *FLOAT32, *options], input=f"{PROMPT}\n/stats\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "no e2llm.json beside" in done.stderr and "assuming method yarn, native window 512" in done.stderr
    assert "once" in done.stderr and "window 512, scale 1" in done.stderr and "key-value memory: 0 of" in done.stderr


def test_serve(here: Path, expected: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")
    process = subprocess.Popen([*E2LLM, "serve", str(TINY), "--port", "0", *FLOAT32], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        port = next(found[1] for line in lines if (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line)))
        url = f"http://127.0.0.1:{port}"
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == expected and answer["e2llm"]["scale"] == 1
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["e2llm"]["engine"] == "llamacpp"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_without_the_package_the_install_line_is_said(here: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        f"from e2llm.cli import main; sys.exit(main(['chat', {str(TINY)!r}, '--raw', '--engine', 'llamacpp']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'e2llm[llamacpp]'" in done.stderr
    assert not list(here.iterdir()), "said before anything is converted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:7"], "device = 'cuda:7'"),
        (["--dtype", "auto", "--kv-gib", "-1"], "kv-gib = -1"),
    ],
)
def test_absurd_settings(here: Path, options: list[str], message: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")
    done = subprocess.run(
        [*E2LLM, "chat", str(TINY), "--raw", "--engine", "llamacpp", *options], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and not list(here.iterdir())
