"""Streams and those who leave them: shape of the events, pings, disconnects, shutdown."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
from conftest import ENGINES, until

pytestmark = pytest.mark.parametrize("engine", [name for name in ENGINES if name != "sequential"], indirect=True)

BODY = {"prompt": "def add(a, b):", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def slow(engine):
    engine.before_step = lambda: time.sleep(0.02)
    return engine


def idle(served):
    getattr(served.engine, "clear_prefix_cache", lambda: None)()
    stats, gate = served.engine.stats(), served.app.state.service.gate
    return stats.running == stats.waiting == stats.kv_tokens_used == gate.running == gate.waiting == 0


def test_the_opening_chunk_comes_before_the_first_token(serve, engine):
    """A client learns scale and window while a long prompt is read."""
    held = threading.Event()
    engine.before_step = lambda: held.wait(20)
    with serve().client() as client, client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-e2llm-scale"] == "1" and "content-length" not in answer.headers
        first = json.loads(next(answer.iter_lines()).removeprefix("data: "))
        assert first["choices"][0]["text"] == "" and first["e2llm"]["window"] == 512
        held.set()


def test_silence_is_broken_by_comments(serve, engine):
    held = threading.Event()
    engine.before_step = lambda: held.wait(20)
    body = BODY | {"stream": True, "max_tokens": 2}
    with serve(ping_seconds=0.05).client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if lines.count(": still working") == 3:
                held.set()
        assert lines.count(": still working") >= 3 and "data: [DONE]" in lines


@pytest.mark.parametrize("path", ["stream", "whole"])
def test_a_client_that_leaves_frees_its_place_at_once(serve, slow, path):
    served = serve()
    if path == "stream":
        with (
            served.client() as client,
            client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer,
        ):
            next(answer.iter_lines())
            assert not idle(served)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=0.3)
    until(lambda: idle(served), 2)
    assert slow.stats().output_tokens_total < 100
    with served.client() as client:
        assert 'end="disconnected"' in client.get("/metrics").text


def test_a_client_that_leaves_before_the_first_token(serve, engine):
    held = threading.Event()
    engine.before_step = lambda: held.wait(20)
    served = serve()
    with served.client() as client, client.stream("POST", "/v1/completions", json=BODY | {"stream": True, "n": 3}):
        pass
    until(lambda: served.app.state.service.gate.running == 0, 2)
    held.set()
    until(lambda: idle(served), 2)
    assert engine.stats().output_tokens_total <= 3  # the step that was under way, no more


def test_shutdown_lets_running_streams_end(serve, slow):
    served = serve(shutdown_seconds=20)
    body = BODY | {"stream": True, "max_tokens": 40}
    with served.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.server.should_exit = True
        until(lambda: refused(served), 5)
        rest = list(lines)
    assert [line for line in rest if line][-1] == "data: [DONE]"
    assert sum('"text"' in line for line in rest) >= 20


def refused(served) -> bool:
    try:
        return httpx.get(f"{served.url}/health", timeout=0.5).status_code != 200
    except httpx.HTTPError:
        return True


def test_shutdown_ends_what_takes_too_long(serve, slow):
    served = serve(shutdown_seconds=1)
    with served.client() as client, client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        start = time.monotonic()
        served.server.should_exit = True
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutdown"
    assert time.monotonic() - start < 5
    until(lambda: slow.stats().running == 0, 2)


def test_logs_say_what_happened_and_not_what_was_said(serve, caplog):
    caplog.set_level("INFO", logger="e2llm.server")
    body = BODY | {"prompt": "my secret plan", "max_tokens": 3}
    with serve(api_keys=("secret-key",)).client(headers={"Authorization": "Bearer secret-key"}) as client:
        request_id = client.post("/v1/completions", json=body).headers["x-request-id"]
        client.post("/v1/completions", json=body | {"temperature": "my secret plan"})
    from e2llm.server.logs import JsonFormatter

    ended = (200, 400)  # a line is written when its request has ended, which a client may learn first
    until(lambda: {getattr(r, "fields", {}).get("status") for r in caplog.records} >= set(ended), 5)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "e2llm.server"]
    told = [json.loads(line) for line in lines]
    done = next(line for line in told if line.get("request_id") == request_id)
    assert done["status"] == 200 and done["output_tokens"] == 3 and done["scale"] == 1 and done["key"] == "key-1"
    assert done["time_to_first_token_seconds"] <= done["seconds"]
    assert "secret" not in "".join(lines)


def test_logs_have_prompts_when_asked_for(serve, caplog):
    caplog.set_level("INFO", logger="e2llm.server")
    with serve(log_prompts=True).client() as client:
        client.post("/v1/completions", json=BODY | {"prompt": "my plan", "max_tokens": 1})
    # The line is written when the request has ended, which a client may learn first.
    until(lambda: any(getattr(r, "fields", {}).get("prompt") == "my plan" for r in caplog.records), 5)


def test_metrics_count_what_ran(serve):
    with serve().client() as client:
        client.post("/v1/completions", json=BODY | {"max_tokens": 3})
        client.post("/v1/completions", json=BODY | {"max_tokens": 3, "scale": 5.5})
        client.post("/v1/completions", json=BODY | {"max_tokens": 3, "scale": 99, "beyond_trained": True})
        client.post("/v1/completions", json={"prompt": ""})
        client.get("/no/such/place")
        told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(told.text):
        found |= {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}
    assert found["e2llm_engine_output_tokens_total",] == 9
    for scale in ("1", "8", "beyond"):  # the steps that hold 1, 5.5 and 99
        ended = ("endpoint", "completions"), ("end", "length"), ("scale", scale)
        assert found["e2llm_answers_total", *sorted(ended)] == 1
        assert found["e2llm_time_to_first_token_seconds_count", ("scale", scale)] == 1
        assert found["e2llm_output_tokens_sum", ("scale", scale)] == 3
    assert found["e2llm_requests_total", ("route", "/v1/completions"), ("status", "400")] == 1
    assert found["e2llm_requests_total", ("route", "other"), ("status", "404")] == 1
    assert found["e2llm_refusals_total", ("code", "invalid_value")] == 1
