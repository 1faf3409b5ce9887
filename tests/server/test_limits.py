"""Places, queue, rate, sizes, times, keys: who is let in, who waits, who is sent away and for how long."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from conftest import until

from e2llm.server.limits import FullError, Gate, RateLimit

BODY = {"prompt": "def add(a, b):", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = BODY | {"max_tokens": 2}


@pytest.fixture
def slow(engine):
    """The engine takes 20 ms a token more than it needs."""
    engine.before_step = lambda: time.sleep(0.02)
    return engine


def test_gate_gives_places_in_order():
    async def go():
        gate, order = Gate(4, 8), []

        async def visit(name, count):
            await gate.enter(count)
            order.append(name)

        await visit("a", 3)
        waiting = [asyncio.create_task(visit(n, c)) for n, c in (("b", 4), ("c", 1), ("d", 3))]
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting, order) == (3, 8, ["a"])  # c would fit, but b came first
        with pytest.raises(FullError):
            await gate.enter(1)
        waiting[0].cancel()  # leaves the queue, and lets c in
        await asyncio.sleep(0.01)
        assert (gate.running, gate.waiting, order) == (4, 3, ["a", "c"])
        gate.leave(3)
        await asyncio.gather(*waiting[1:])
        assert (gate.running, gate.waiting, order) == (4, 0, ["a", "c", "d"])

    asyncio.run(go())


def test_gate_loses_no_place_to_a_cancellation_in_the_same_step():
    async def go():
        gate = Gate(1, 1)
        await gate.enter(1)
        waiting = asyncio.create_task(gate.enter(1))
        await asyncio.sleep(0)
        gate.leave(1)  # lets it in …
        waiting.cancel()  # … and it never hears of it
        await asyncio.gather(waiting, return_exceptions=True)
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(go())


def test_rate_limit_is_a_bucket_for_each_client():
    now = 0.0
    rate = RateLimit(60, 3, clock=lambda: now)
    assert [rate.take("a") for _ in range(4)] == [0, 0, 0, 1.0]
    assert rate.take("b") == 0
    now = 0.5
    assert rate.take("a") == 0.5
    now = 1.0
    assert rate.take("a") == 0
    now = 1000.0
    assert [rate.take("a") for _ in range(4)] == [0, 0, 0, 1.0]  # never more than the burst


def test_rate_over_http(serve):
    served = serve(api_keys=("first-key", "second-key"), requests_per_minute=6, burst=2)
    with served.client(headers={"Authorization": "Bearer first-key"}) as client:
        answers = [client.post("/v1/completions", json=SHORT) for _ in range(3)]
        assert [a.status_code for a in answers] == [200, 200, 429]
        assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 10
        other = {"Authorization": "Bearer second-key"}
        assert client.post("/v1/completions", json=SHORT, headers=other).status_code == 200
        assert client.get("/health").status_code == 200


def test_keys(serve):
    served = serve(api_keys=("first-key", "second-key"))
    with served.client() as client:
        for header in ("", "Bearer", "Bearer first-kez", "Basic first-key", "Bearer first-key second-key"):
            answer = client.get("/v1/models", headers={"Authorization": header})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"Authorization": "bearer second-key"}).status_code == 200
        assert client.get("/v1/models", headers={b"Authorization": b"Bearer \xff"}).status_code == 401
        for path in ("/", "/health", "/metrics"):
            assert client.get(path).status_code == 200


def test_large_bodies(serve):
    served = serve(max_request_bytes=10_000)
    with served.client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 200
        told = client.post("/v1/completions", json=SHORT | {"user": "x" * 20_000})
        assert told.status_code == 413 and told.json()["error"]["code"] == "request_too_large"

        def pieces():  # its length is not said before
            yield b'{"prompt":"'
            for _ in range(20):
                yield b"a" * 1000

        streamed = client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        assert streamed.status_code == 413
    assert served.engine.stats().prompt_tokens_total < 100


@pytest.mark.parametrize("header, status", [("Connection: close", 401), ("Connection: keep-alive", 413)])
def test_a_client_that_sends_all_before_it_reads_sees_why_it_was_refused(serve, header, status):
    """A connection closed over unread bytes is reset, and the answer with it."""
    served = serve(max_request_bytes=10_000, api_keys=("first-key",))
    key = "wrong" if status == 401 else "first-key"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n{header}\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(10)
        raw.sendall(f"{head}Content-Length: 8000000\r\n\r\n".encode())
        for _ in range(80):
            raw.sendall(b"x" * 100_000)
            time.sleep(0.001)
        answer = b"".join(iter(lambda: raw.recv(10_000), b"")) if status == 413 else raw.recv(10_000)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_whoever_sends_for_too_long_is_not_listened_to(serve, monkeypatch):
    monkeypatch.setattr("e2llm.server.body._LINGER_SECONDS", 0.3)
    served = serve(max_request_bytes=10)
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        end = time.monotonic() + 10
        with pytest.raises(OSError):  # sending into a closed connection
            while time.monotonic() < end:
                raw.sendall(b"x")
                time.sleep(0.01)


def test_a_body_that_never_ends(serve):
    served = serve(body_timeout_seconds=0.2)
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        raw.sendall(head.encode())
        raw.settimeout(10)
        assert b" 408 " in raw.recv(1000).split(b"\r\n")[0]


def test_queue_is_finite_and_first_come_first_served(serve, slow):
    served = serve(max_concurrent=1, max_queue=1)
    statuses: dict[str, int] = {}

    def ask(name: str, tokens: int) -> None:
        with served.client() as client:
            statuses[name] = client.post("/v1/completions", json=BODY | {"max_tokens": tokens}).status_code

    gate = served.app.state.service.gate
    first = threading.Thread(target=ask, args=("first", 40))
    first.start()
    until(lambda: gate.running == 1)
    second = threading.Thread(target=ask, args=("second", 2))
    second.start()
    until(lambda: gate.waiting == 1)
    with served.client() as client:
        full = client.post("/v1/completions", json=SHORT)
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        assert client.post("/v1/completions", json=SHORT | {"n": 2}).json()["error"]["code"] == "too_many_choices"
    first.join()
    second.join()
    assert statuses == {"first": 200, "second": 200} and gate.running == gate.waiting == 0


def test_whoever_leaves_the_queue_makes_room(serve, slow):
    served = serve(max_concurrent=1, max_queue=1)
    gate = served.app.state.service.gate
    with served.client() as client, client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as running:
        assert running.status_code == 200 and gate.running == 1
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=SHORT, timeout=0.2)
        until(lambda: gate.waiting == 0)
    until(lambda: gate.running == slow.stats().running == 0)


def test_timeouts(serve, slow):
    served = serve(request_timeout_seconds=0.3)
    with served.client() as client:
        whole = client.post("/v1/completions", json=BODY)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        streamed = client.post("/v1/completions", json=BODY | {"stream": True})
        assert streamed.status_code == 200
        events = streamed.text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(events) > 3  # and what came before it was sent
    until(lambda: slow.stats().running == slow.stats().waiting == 0)


def test_a_timeout_counts_the_queue(serve, slow):
    served = serve(request_timeout_seconds=0.5, max_concurrent=1)
    with served.client() as one, served.client() as two:
        threading.Thread(target=one.post, args=("/v1/completions",), kwargs={"json": BODY}, daemon=True).start()
        until(lambda: slow.stats().running == 1)
        late = two.post("/v1/completions", json=BODY | {"stream": True})
        assert late.status_code in (504, 200)  # in the queue, or just let in
        assert "timeout" in late.text


def test_output_limit(serve):
    served = serve(max_output_tokens=5)
    with served.client() as client:
        assert (
            client.post("/v1/completions", json=BODY | {"max_tokens": None}).json()["usage"]["completion_tokens"] == 5
        )
        assert client.post("/v1/completions", json=BODY).json()["error"]["code"] == "max_tokens_too_large"


def test_cors_is_off_by_default_and_exact_when_on(serve):
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serve().client() as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=asks).headers
    with serve(cors_origins=("https://a.example",), api_keys=("long-enough",)).client() as client:
        flight = client.options("/v1/completions", headers=asks)
        assert flight.status_code == 200 and flight.headers["access-control-allow-origin"] == "https://a.example"
        asks["Origin"] = "https://b.example"
        assert "access-control-allow-origin" not in client.options("/v1/completions", headers=asks).headers
