"""Where the answer looks: the same answer as the engine's, shares that add up, and spans at the right tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from architectures import WINDOW, tiny_model
from texts import character_tokenizer, random_documents
from torch.utils._python_dispatch import TorchDispatchMode

from e2llm.evaluate.attention import STRETCHES, _Sums, look
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.retrieval import make_prompts
from e2llm.evaluate.run import evaluate
from e2llm.evaluate.tasks import UUID_KV
from e2llm.hf import install
from e2llm.infer import Engine, RequestPlan


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = tiny_model("llama")
    install(model, method="yarn")
    return Engine(model, character_tokenizer())


def prompts(count: int = 3, window: int = 640):
    return make_prompts(
        character_tokenizer(), random_documents(1, 800), window=window, num_prompts=count, seed=0, task=UUID_KV
    )


def test_spans_are_the_values() -> None:
    tokenizer = character_tokenizer()
    for prompt in prompts():
        texts = [tokenizer.decode([prompt.token_ids[i] for i in span]) for span in prompt.spans]
        assert texts[0] == prompt.expected and len(set(texts)) == 3 and all(len(text) == 36 for text in texts)


def test_the_answer_is_the_engines_and_shares_add_up(engine: Engine) -> None:
    prompt = prompts(1)[0]
    scale = 640 / WINDOW
    found = look(engine, prompt, scale=scale)
    expected = engine.complete(prompt.token_ids, RequestPlan(scale, 640, prompt.answer_tokens))
    assert list(found.token_ids) == expected.token_ids
    assert found.on_span.shape == (2, 4) and found.by_stretch.shape == (2, STRETCHES)
    # All attention is on the prompt or on what was answered so far; the first token saw the prompt alone.
    first = look(engine, dataclasses.replace(prompt, answer_tokens=1), scale=scale)
    np.testing.assert_allclose(first.by_stretch.sum(-1), 1, rtol=1e-5)
    assert (found.by_stretch.sum(-1) <= 1).all() and (found.on_span + found.on_others < 1).all()


def test_the_first_step_equals_eager_attention(engine: Engine) -> None:
    prompt = dataclasses.replace(prompts(1)[0], answer_tokens=1)
    found = look(engine, prompt, scale=2.0)
    engine.model.set_attn_implementation("eager")
    with engine.at_scale(2.0):
        weights = engine.model(input_ids=torch.tensor([prompt.token_ids]), output_attentions=True).attentions
    engine.model.set_attn_implementation("sdpa")
    span = prompt.spans[0]
    expected = np.array([w[0, :, -1, span.start : span.stop].sum(-1).numpy() for w in weights])
    np.testing.assert_allclose(found.on_span, expected, rtol=1e-3, atol=1e-6)


def test_a_head_that_copies_scores_and_others_do_not() -> None:
    prompt = [5, 6, 7, 8, 9, 7]
    sums = _Sums(prompt, range(2, 4), [range(4, 5)])
    for step, (token, place) in enumerate([(7, 2), (8, 3), (7, 5)]):  # the last looks at the same token elsewhere
        weights = torch.full((2, len(prompt) + step), 0.01)
        weights[0, place] = 1.0
        weights[1, 5 - place if place < 5 else 0] = 1.0  # inside the value, at another token than is written
        sums(0, weights / weights.sum(-1, keepdim=True))
        sums.written(token)
    assert sums.scores().tolist() == [[1.0, 0.0]]
    on_span = sums.mean(sums.on_span)[0]
    assert on_span[0] == pytest.approx(on_span[1]) and on_span[0] > 0.6  # both look at the value, one copies it


def test_rows_of_an_evaluation(engine: Engine) -> None:
    config = EvaluateConfig(windows=(640,), protocols=("attention",), prompts=2, base_model="tiny")
    record = evaluate(engine, {"noise": random_documents(1, 800)}, config)
    values = {row["metric"]: row for row in record.rows}
    assert set(values) == {
        "attention_on_span",
        "attention_on_others",
        "attention_if_even",
        "attention_of_best_head",
        "retrieval_heads",
    }
    assert values["attention_on_span"]["n"] == 2
    assert values["attention_if_even"]["value"] == pytest.approx(36 / record.examples[0]["prompt_tokens"])
    shown = [example["on_span"] for example in record.examples[:-1]]
    span = values["attention_on_span"]
    # Two prompts: the interval's ends are the one and the other alone.
    assert (span["low"], span["high"]) == pytest.approx((min(shown), max(shown)), abs=1e-5)
    assert all(row["low"] <= row["value"] <= row["high"] for row in record.rows)
    maps = record.examples[-1]
    assert maps["metric"] == "attention_map" and len(maps["by_stretch"]) == 2 and len(maps["on_span"][0]) == 4
    assert values["attention_of_best_head"]["value"] == pytest.approx(np.max(maps["on_span"]), abs=1e-6)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return found


def test_no_tensor_grows_with_the_square_of_the_prompt(engine: Engine) -> None:
    """Twice the prompt: at most twice the largest tensor, far below all pairs of tokens."""
    found = []
    for window in (4096, 8192):
        (prompt,) = make_prompts(
            character_tokenizer(), random_documents(1, 9000), window=window, num_prompts=1, seed=0, task=UUID_KV
        )
        with _Largest() as largest:
            look(engine, dataclasses.replace(prompt, answer_tokens=2), scale=window / WINDOW)
        found.append(largest.elements)
        assert largest.elements < window * window / 16, "all pairs of tokens of one head are more"
    assert found[1] <= 2.1 * found[0]
