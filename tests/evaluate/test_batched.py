"""Answers in batches are those of one prompt after the other, and the model is as it was afterwards."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from architectures import WINDOW, tiny_model
from texts import BYTE_VOCABULARY, byte_tokenizer, character_tokenizer, random_documents

from e2llm.evaluate import asking
from e2llm.evaluate.batched import Asked, Reply, replies, step_tokens
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.key_values import kv_kind
from e2llm.evaluate.questions import Texts, ask, make_question
from e2llm.evaluate.run import evaluate, plan_parts
from e2llm.evaluate.suite import evaluate_suite
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import SUITES, load_data
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


@pytest.mark.parametrize(
    ("device", "longest", "expected"),
    [("cuda", 32_768, 32_768), ("cuda", 65_536, 131_072), ("cuda", 500_000, 131_072), ("cpu", 65_536, 4096)],
)
def test_long_prompts_have_long_steps_on_a_gpu(device: str, longest: int, expected: int) -> None:
    asked = [Asked(range(tokens), RequestPlan(1.0, tokens, 1, ())) for tokens in (7, longest)]
    assert step_tokens(device, asked) == expected and step_tokens("xpu", asked) is None


@pytest.fixture(scope="module")
def byte_engine() -> Engine:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    install(model, method="yarn")
    return Engine(model, byte_tokenizer(), max_scale=32.0)


def corpus(engine: Engine, words: int = 400) -> dict[str, list[Document]]:
    draw = random.Random(1)
    names = [f"{a}{b}{c}word" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    ids = [engine.tokenizer(" ".join(draw.choices(names, k=words))).input_ids for _ in range(2)]
    return {"noise": [Document(f"{i}.txt", np.asarray(one, dtype=np.int32)) for i, one in enumerate(ids)]}


def test_every_protocol_that_asks_gives_the_same_record(byte_engine: Engine) -> None:
    asks = ("pass_key", "uuid_kv", "needle", "multi_needle", "kv_pairs", "niah_single_1", "niah_multivalue", "vt")
    config = EvaluateConfig(windows=(1280,), protocols=asks, prompts=3)
    alone = evaluate(byte_engine, corpus(byte_engine), config)
    together = evaluate(byte_engine, corpus(byte_engine), dataclasses.replace(config, batch_size=4))
    assert together.rows == alone.rows and together.examples == alone.examples
    assert len({example["answer"] for example in alone.examples}) > 3


@pytest.mark.parametrize("per_request", [False, True])
def test_a_suite_gives_the_same_answers(byte_engine: Engine, tmp_path: Path, per_request: bool) -> None:
    """Samples of different length, some cut, in batches that mix them; with a scale each, batches mix scales too."""
    draw = random.Random(2)
    for task in ("hotpotqa", "lcc"):
        rows = [
            {
                "_id": f"{i}",
                "input": "Who?",
                "context": "".join(draw.choices("abcdef ", k=40 + 150 * i)),
                "answers": ["x"],
            }
            for i in range(7)
        ]
        lines = [json.dumps(row | {"all_classes": None}) for row in rows]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    records = []
    for size in (None, 3):
        config = SuiteConfig(
            suite="longbench", model="m", tasks_folder=str(tmp_path), tasks=("hotpotqa", "lcc"), windows=(768,),
            scale_per_request=per_request, batch_size=size,
        )  # fmt: skip
        suite = SUITES["longbench"]
        records.append(evaluate_suite(byte_engine, suite, load_data(suite, config), config))
    alone, together = records
    assert together.rows == alone.rows and together.examples == alone.examples
    assert len({example["answer"] for example in alone.examples}) > 3
    assert len({example["scale"] for example in alone.examples}) == (3 if per_request else 1)
    assert any(example["cut_tokens"] for example in alone.examples)


def test_a_batch_that_was_stopped_goes_on(byte_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that were there are not asked again, and the others are the ones they would have been."""
    row = {"input": "", "answers": ["x"], "all_classes": None}
    lines = [json.dumps(row | {"context": "ab " * (20 + i)}) for i in range(9)]
    (tmp_path / "lcc.jsonl").write_text("\n".join(lines))
    config = SuiteConfig(
        suite="longbench", model="m", tasks_folder=str(tmp_path), tasks=("lcc",), windows=(512,), batch_size=3
    )
    suite = SUITES["longbench"]
    data = load_data(suite, config)
    whole = evaluate_suite(byte_engine, suite, data, config)
    asked: list[int] = []
    real, partial = asking.replies, tmp_path / "partial.jsonl"

    def stops(engine: Engine, some: Sequence[Asked], *, batch: int) -> Iterator[Reply]:
        asked.append(len(some))
        for number, reply in enumerate(real(engine, some, batch=batch)):
            if len(asked) == 1 and number == 4:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr(asking, "replies", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(byte_engine, suite, data, config, partial=partial)
    again = evaluate_suite(byte_engine, suite, data, config, partial=partial)
    assert asked == [9, 5] and again.rows == whole.rows and again.examples == whole.examples


def test_what_reads_alone_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    install(model, method="dynamic_ntk")
    engine = Engine(model, character_tokenizer())
    config = EvaluateConfig(windows=(512,), protocols=("whole", "pass_key"), batch_size=2)
    with pytest.raises(ValueError, match="dynamic_ntk' switches its frequencies by length"):
        plan_parts(engine, {"noise": random_documents(1, 512)}, config)
    plan_parts(engine, {"noise": random_documents(1, 512)}, dataclasses.replace(config, protocols=("whole",)))


def test_a_model_that_reads_one_length_is_refused() -> None:
    model = tiny_model("llama")
    install(model, method="dynamic_ntk")
    engine = Engine(model, character_tokenizer())
    with pytest.raises(ValueError, match="dynamic_ntk' switches its frequencies by length"):
        list(replies(engine, [Asked([5, 6], RequestPlan(2.0, 64, 2))], batch=2))
