"""Many clients at once, short and long, a third of which vanish: nobody gets another's answer, nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from conftest import ENGINES, until

pytestmark = pytest.mark.parametrize("engine", ENGINES, indirect=True)

WORDS = "river mill house water door field stone letter garden winter road bread lamp".split()
NEW_TOKENS = 12


@dataclass(frozen=True)
class Client:
    prompt: str
    stream: bool
    vanishes: bool
    expected: str


@pytest.fixture
def clients(base):
    """clients(count): their prompts, no two alike, and what the engine alone answers to each."""

    def make(count: int, longest: int) -> list[Client]:
        source = random.Random(count)
        made = []
        for index in range(count):
            words = longest if index % 8 == 7 else 30
            prompt = f"Letter {index}. " + " ".join(source.choices(WORDS, k=words)) + "."
            expected = base.generate(prompt, max_new_tokens=NEW_TOKENS).text
            made.append(Client(prompt, index % 2 == 0 or index % 3 == 0, index % 3 == 0, expected))
        return made

    return make


async def visit(http: httpx.AsyncClient, client: Client) -> str:
    """What a client read, as a word: right, vanished, or what was wrong."""
    body = {"prompt": client.prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": client.stream}
    if not client.stream:
        answer = await http.post("/v1/completions", json=body)
        text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
        return "right" if text == client.expected else f"{text!r} for {client.expected!r}"
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return "right" if text == client.expected else f"{text!r} for {client.expected!r}"
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                if client.vanishes and text:
                    return "vanished" if client.expected.startswith(text) else f"{text!r} for {client.expected!r}"
    return f"cut off after {text!r}"


def crowd(served, clients) -> dict[str, int]:
    """All clients at once; how many of them read what."""

    async def go():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as http:
            return await asyncio.gather(*(visit(http, client) for client in clients))

    seen = asyncio.run(go())
    return {word: seen.count(word) for word in seen}


def nothing_is_left(served) -> None:
    gate, engine = served.app.state.service.gate, served.engine
    until(lambda: gate.running == gate.waiting == engine.stats().running == engine.stats().waiting == 0, 20)
    until(lambda: not [t for t in threading.enumerate() if t.name == "e2llm-stream"], 20)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_twenty_clients(clients, serve):
    visitors = clients(20, longest=700)
    served = serve(max_concurrent=8, max_queue=64)
    seen = crowd(served, visitors)
    assert set(seen) <= {"right", "vanished"}, seen
    assert seen["right"] >= 13 and seen["vanished"] >= 5
    nothing_is_left(served)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_clients_again_and_again(clients, serve):
    visitors = clients(200, longest=1000)
    served = serve(max_concurrent=64, max_queue=256)
    memory = []
    for _ in range(3):
        seen = crowd(served, visitors)
        assert set(seen) <= {"right", "vanished"}, seen
        assert seen["vanished"] >= 60
        nothing_is_left(served)
        memory.append(resident_bytes())
    assert memory[-1] - memory[0] < 64 * 2**20, memory
    getattr(served.engine, "clear_prefix_cache", lambda: None)()
    assert served.engine.stats().kv_tokens_used == 0  # nobody holds a page any more
