"""The official client against a real port: what it parses is what the engine alone answers."""

from __future__ import annotations

import math

import openai
import pytest
from conftest import ENGINES

pytestmark = pytest.mark.parametrize("engine", ENGINES, indirect=True)

PROMPT = "def add(a, b):\n    return"
LONG = "The river ran past the mill and the old house stood by the water. " * 60


@pytest.fixture
def client(serve):
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def expected(base):
    """prompt -> what `infer.Engine` says, made before any server runs."""
    return {prompt: base.generate(prompt, max_new_tokens=12) for prompt in (PROMPT, LONG)}


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    assert model.model_dump()["e2llm"]["max_window"] == 8192


@pytest.mark.parametrize(("prompt", "scale"), [(PROMPT, 1), (LONG, 4)])
def test_completion_equals_the_engine_alone(expected, client, prompt, scale):
    answer = client.completions.with_raw_response.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
    body = answer.parse()
    assert body.choices[0].text == expected[prompt].text
    assert body.choices[0].finish_reason == expected[prompt].finish_reason == "length"
    assert body.usage.prompt_tokens == expected[prompt].prompt_tokens
    assert body.usage.completion_tokens == 12
    assert body.model_extra["e2llm"] == {"scale": scale, "window": 512 * scale, "warnings": []}
    assert answer.headers["x-e2llm-scale"] == str(scale)
    assert answer.headers["x-e2llm-window"] == str(512 * scale)


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_stream_equals_the_engine_alone(expected, client, prompt):
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected[prompt].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    usage = chunks[-1]
    assert not usage.choices and usage.usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])
    said = [c.model_extra.get("e2llm") for c in chunks if c.choices]
    assert said[0] == said[-1] != None and not any(said[1:-1])  # noqa: E711
    assert said[0]["scale"] == expected[prompt].scale


def test_many_prompts_and_answers(expected, client):
    ids = client.completions.create(model="tiny", prompt=[PROMPT, LONG], n=2, max_tokens=12, temperature=0)
    assert [c.index for c in ids.choices] == [0, 1, 2, 3]
    assert [c.text for c in ids.choices] == [expected[p].text for p in (PROMPT, PROMPT, LONG, LONG)]
    assert [c.model_extra["e2llm"]["scale"] for c in ids.choices] == [1, 1, 4, 4]
    assert ids.usage.prompt_tokens == sum(expected[p].prompt_tokens for p in (PROMPT, LONG))
    assert ids.usage.completion_tokens == 48


def test_token_ids_are_taken_as_they_are(base, expected, client):
    ids = base.tokenizer(PROMPT).input_ids
    for prompt in (ids, [ids, ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert {c.text for c in answer.choices} == {expected[PROMPT].text}


def test_stop_ends_the_text_before_it(expected, client):
    full = expected[PROMPT].text
    stop = full[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop, "never"], stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(c.choices[0].text for c in chunks) == full[: full.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_seeds(client):
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=1.5, seed=seed, n=2, extra_body={"top_k": 0}
        )
        return [c.text for c in answer.choices]

    first, second = draw(7)
    assert [first, second] == draw(7)
    assert first != second and draw(8)[0] == second
    assert draw(-(2**63)) and draw(2**63 - 1)


def test_settings_next_to_nothing_are_greedy(expected, client):
    for least in ({"temperature": 5e-324}, {"temperature": 1.0, "top_p": 5e-324}, {"temperature": 1, "top_p": 1e-7}):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **least)
        assert answer.choices[0].text == expected[PROMPT].text


def test_a_scale_may_be_asked_for(client):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, extra_body={"scale": 8}
    )
    assert answer.model_extra["e2llm"] == {"scale": 8.0, "window": 4096, "warnings": []}
    beyond = {"scale": 32, "beyond_trained": True}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, extra_body=beyond)
    assert "outside the trained range" in answer.model_extra["e2llm"]["warnings"][0]


def test_completion_logprobs_sum_to_what_the_model_says(base, client):
    import torch

    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]
    prompt, new = base.tokenizer(PROMPT).input_ids, base.tokenizer.convert_tokens_to_ids
    ids = prompt + [new(base.tokenizer.tokenize(t)[0]) for t in found.tokens]
    with torch.no_grad(), base.at_scale(1.0):
        values = torch.log_softmax(base.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1], -1)
    for row, token, logprob, top in zip(
        values, ids[len(prompt) :], found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert math.isclose(logprob, float(row[token]), abs_tol=1e-3)
        assert len(top) == 3 and max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)


def test_bad_requests_reach_the_client_as_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-9", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=LONG, max_tokens=8000)
    assert long.value.code == "context_length_exceeded" and "8192" in long.value.message
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert chat.value.code == "no_chat_template"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def chat(base, engine, serve, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE)
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(base, chat):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = base.generate("system: Be brief.\nuser: Hi\nassistant:", max_new_tokens=10)
    whole = chat.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=10, temperature=0)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.model_extra["e2llm"]["scale"] == 1
    chunks = list(
        chat.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0, stream=True)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"


def test_chat_logprobs(chat):
    for stream in (False, True):
        answer = chat.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream=stream,
        )
        choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
        content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
        text = "".join(c.delta.content or "" for c in choices) if stream else choices[0].message.content
        assert len(content) == 8
        assert b"".join(bytes(entry.bytes) for entry in content).decode() == text
        assert all(entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) for entry in content)  # greedy
        assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_a_template_may_refuse(chat):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(openai.BadRequestError, match="system comes first") as refused:
        chat.chat.completions.create(model="tiny", messages=messages)
    assert refused.value.code == "chat_template_error"
