"""Answers in batches are those of one prompt after the other, and the model is as it was afterwards."""

from __future__ import annotations

import pytest
from architectures import WINDOW, tiny_model
from texts import character_tokenizer, random_documents

from e2llm.evaluate.batched import Asked, replies
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.key_values import kv_kind
from e2llm.evaluate.questions import Texts, ask, make_question
from e2llm.hf import install
from e2llm.infer import Engine, RequestPlan


def test_the_same_answers_in_order() -> None:
    model = tiny_model("llama")
    install(model, method="yarn")
    engine = Engine(model, character_tokenizer())
    texts = Texts(random_documents(1, 64), engine.tokenizer)
    frame = make_frame(engine.tokenizer, False)
    kind, scale = kv_kind(), 512 / WINDOW
    questions = [make_question(kind, texts, frame, window=512, index=i, seed=0) for i in range(5)]
    told: list[int] = []
    alone = ask(engine, kind, questions, scale)
    together = ask(engine, kind, questions, scale, told.append, batch=3)
    assert [one.answer for one in together] == [one.answer for one in alone] and told == [512] * 5
    assert len({one.answer for one in alone}) > 1
    assert model.config._attn_implementation == "sdpa" and engine.extension.scale is None


def test_a_model_that_reads_one_length_is_refused() -> None:
    model = tiny_model("llama")
    install(model, method="dynamic_ntk")
    engine = Engine(model, character_tokenizer())
    with pytest.raises(ValueError, match="dynamic_ntk' switches its frequencies by length"):
        list(replies(engine, [Asked([5, 6], RequestPlan(2.0, 64, 2))], batch=2))
