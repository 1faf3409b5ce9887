"""What cannot be served is refused in OpenAI's form, with a status of its own and a sentence that helps. Never 500."""

from __future__ import annotations

import json

import httpx
import pytest

from e2llm.server import ServerSettings, create_app

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD = {
    "not json": (b"{", "invalid_json", "JSON"),
    "no body": (b"", "invalid_json", "JSON object"),
    "a list": (b"[]", "invalid_json", "JSON object"),
    "invalid utf-8": (b'{"prompt": "\xff"}', "invalid_json", "UTF-8"),
    "deep": (b"[" * 100_000, "invalid_json", "JSON"),
    "a huge number": (b'{"prompt":"a","seed":' + b"1" * 5000 + b"}", "invalid_json", "JSON"),
    "a lone surrogate": (b'{"prompt":"\\ud800"}', "invalid_value", "unicode"),
    "nothing": (b"{}", "missing_field", "'prompt' is missing"),
    "empty prompt": ({"prompt": ""}, "invalid_value", "empty"),
    "no prompts": ({"prompt": []}, "invalid_value", "empty"),
    "an empty one of two": ({"prompt": ["a", ""]}, "invalid_value", "prompt"),
    "no ids": ({"prompt": [[]]}, "invalid_value", "empty"),
    "mixed": ({"prompt": [1, "a"]}, "invalid_value", "token ids"),
    "true is no id": ({"prompt": [True]}, "invalid_value", "token ids"),
    "a negative id": ({"prompt": [-1]}, "invalid_value", "greater than or equal to 0"),
    "id outside": ({"prompt": [4096]}, "invalid_token_id", "0 to 4095"),
    "unknown field": ({"prompt": "a", "temprature": 1}, "unknown_field", "'temprature'"),
    "hot": ({"prompt": "a", "temperature": 101}, "invalid_value", "temperature"),
    "nan": (b'{"prompt":"a","top_p":NaN}', "invalid_value", "finite"),
    "no share": ({"prompt": "a", "top_p": 0}, "invalid_value", "top_p"),
    "min_p": ({"prompt": "a", "min_p": -0.5}, "invalid_value", "min_p"),
    "top_k": ({"prompt": "a", "top_k": -1}, "invalid_value", "top_k"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
    "text for a number": ({"prompt": "a", "max_tokens": "5"}, "invalid_value", "integer"),
    "too long": ({"prompt": "a", "max_tokens": 8192}, "context_length_exceeded", "8192"),
    "absurd": ({"prompt": "a", "max_tokens": 2**31 - 1}, "context_length_exceeded", "8192"),
    "scale below 1": ({"prompt": "a", "scale": 0.5}, "invalid_value", "scale"),
    "past memory": (
        {"prompt": "a", "max_tokens": 200_000, "beyond_trained": True, "scale": 512},
        "request_refused",
        "200",
    ),
    "absurd scale": ({"prompt": "a", "scale": 1e300}, "invalid_value", "scale"),
    "empty stop": ({"prompt": "a", "stop": ""}, "invalid_value", "stop"),
    "many stops": ({"prompt": "a", "stop": ["x"] * 17}, "invalid_value", "stop"),
    "n": ({"prompt": "a", "n": 0}, "invalid_value", "n"),
    "many": ({"prompt": "a", "n": 17}, "too_many_choices", "at most 16"),
    "many prompts": ({"prompt": ["a"] * 9, "n": 2}, "too_many_choices", "at most 16"),
    "seed": ({"prompt": "a", "seed": 2**63}, "invalid_value", "seed"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
    "echo": ({"prompt": "a", "echo": True}, "invalid_value", "not supported"),
    "penalty": ({"prompt": "a", "frequency_penalty": 0.5}, "invalid_value", "not supported"),
    "best_of": ({"prompt": "a", "best_of": 3}, "invalid_value", "value of n"),
    "options": ({"prompt": "a", "stream_options": {}}, "invalid_value", "needs stream"),
}
BAD_CHAT = {
    "no messages": ({"messages": []}, "invalid_value", "messages"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "role"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "content"),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "invalid_value", "not supported"),
    "json mode": (
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
        "invalid_value",
        "not supported",
    ),
    "alone": ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "invalid_value", "needs logprobs"),
    "no template": ({"messages": [{"role": "user", "content": "a"}]}, "no_chat_template", "/v1/completions"),
}


@pytest.fixture
def send(engine):
    """send(path, body) -> response, in this process."""
    import asyncio

    app = create_app(engine, ServerSettings(model_name="tiny"))

    def post(path, body, method="POST", **headers):
        async def go():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.request(
                    method, path, content=content, headers={"content-type": "application/json", **headers}
                )

        return asyncio.run(go())

    return post


def check(response, status, code, says):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and says in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert len(response.text) < 1000  # nothing large is sent back


@pytest.mark.parametrize(("body", "code", "says"), BAD.values(), ids=BAD.keys())
def test_bad_completions(send, body, code, says):
    check(send(COMPLETIONS, body), 400, code, says)


@pytest.mark.parametrize(("body", "code", "says"), BAD_CHAT.values(), ids=BAD_CHAT.keys())
def test_bad_chats(send, body, code, says):
    check(send(CHAT, body), 400, code, says)


def test_wrong_addresses(send):
    check(send(COMPLETIONS, {"prompt": "a", "model": "x" * 5000}), 404, "model_not_found", "'tiny'")
    check(send("/v1/nothing", {}), 404, "not_found", "/v1/nothing")
    check(send("/v1/models/other", b"", "GET"), 404, "model_not_found", "'other'")
    check(send(COMPLETIONS, b"", "GET"), 405, "method_not_allowed", "Not Allowed")
    check(
        send(COMPLETIONS, b'{"prompt":"a"}', **{"content-type": "text/plain"}), 400, "invalid_json", "application/json"
    )


def test_fields_that_mean_nothing_are_accepted(send):
    body = {
        "prompt": "a",
        "max_tokens": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
    }
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "echo": False,
        "best_of": 1,
        "stop": None,
    }
    assert send(COMPLETIONS, body | neutral).status_code == 200


def test_an_engine_that_fails_is_a_server_error(send, engine):
    def broken():
        raise MemoryError("secret prompt")

    engine.before_step = broken
    response = send(COMPLETIONS, {"prompt": "a", "max_tokens": 2})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    streamed = send(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "stream": True})
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_error"


def test_a_closed_engine_is_unavailable(send, engine):
    engine.close()
    response = send(COMPLETIONS, {"prompt": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]


def test_tokenize(send):
    told = send("/v1/tokenize", {"prompt": "The river ran past. " * 100}).json()
    assert told["scale"] == 4 and told["window"] == 2048 and told["fits"] and told["max_new_tokens"] == 1024
    assert send("/v1/tokenize", {"prompt": ""}).json()["count"] == 0
    told = send("/v1/tokenize", {"prompt": "The river ran past. " * 2000, "max_tokens": 10}).json()
    assert not told["fits"] and "never trained" in told["warnings"][0]
    check(send("/v1/tokenize", {}), 400, "invalid_value", "either")
    check(send("/v1/tokenize", {"messages": [{"role": "user", "content": "a"}]}), 400, "no_chat_template", "template")
