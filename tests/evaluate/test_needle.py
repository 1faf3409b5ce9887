"""Needle maps: every needle at its depth, each one counted for its own, through the engine that users run."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import tiny_model
from ruler_texts import word_texts

from e2llm.evaluate import question_rows
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.needle import DEPTHS, NEEDLE_MAPS, NUM_NEEDLES
from e2llm.evaluate.questions import Texts, judge, make_question
from e2llm.evaluate.run import evaluate, plan_parts
from e2llm.infer import Engine


@pytest.fixture(scope="module")
def texts() -> Texts:
    return word_texts()


def test_one_needle_goes_through_all_depths(texts: Texts) -> None:
    frame = make_frame(texts.tokenizer, False)
    for index in range(DEPTHS):
        question = make_question(NEEDLE_MAPS["needle"], texts, frame, window=2048, index=index, seed=0)
        text = texts.tokenizer.decode(question.token_ids)
        body = text[: text.index("\n\nWhat is the secret number")]
        assert question.depths == (index / 10,)
        assert text.count(question.expected[0]) == 1
        assert abs(body.index(question.expected[0]) / len(body) - index / 10) < 0.07
        assert 2048 - 4 <= len(question.token_ids) + question.answer_tokens <= 2048


def test_several_needles_one_in_each_part(texts: Texts) -> None:
    kind = NEEDLE_MAPS["multi_needle"]
    question = make_question(kind, texts, make_frame(texts.tokenizer, False), window=2048, index=2, seed=0)
    text = texts.tokenizer.decode(question.token_ids)
    assert sorted(int(depth * NUM_NEEDLES) for depth in question.depths) == list(range(NUM_NEEDLES))
    by_depth = [value for _, value in sorted(zip(question.depths, question.expected, strict=True))]
    assert [text.index(value) for value in by_depth] == sorted(text.index(value) for value in by_depth)
    answer = f" {question.expected[0]} and {question.expected[3]}"
    judged = judge(kind, question, answer)
    assert judged.score == pytest.approx(2 / 5) and judged.found == (True, False, False, True, False)


def test_rows_by_depth_and_a_stop_in_between(
    texts: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", vocab_size=len(texts.tokenizer))
    engine = Engine(model, texts.tokenizer)
    config = EvaluateConfig(
        windows=(512, 1024), protocols=("needle", "multi_needle", "niah_single_2"), prompts=3, base_model="tiny"
    )
    corpora = {"noise": texts.documents}

    def answers(found: list[int]):  # the right one to every second question
        def complete(self, ids, plan, **options):
            found.append(plan.window)
            text = tokens_of[tuple(ids)] if len(found) % 2 else "no"
            return type("Completion", (), {"text": text, "token_ids": [], "finish_reason": "stop"})()

        return complete

    tokens_of = {}
    real = question_rows.make_question

    def remembered(kind, *args, **options):
        question = real(kind, *args, **options)
        tokens_of[question.token_ids] = " ".join(question.expected)
        return question

    monkeypatch.setattr(question_rows, "make_question", remembered)
    calls: list[int] = []
    monkeypatch.setattr(Engine, "complete", answers(calls))
    record = evaluate(engine, corpora, config, partial=tmp_path / "x.jsonl")
    assert len(calls) == 3 * 2 * 3
    again = evaluate(engine, corpora, config, partial=tmp_path / "x.jsonl")
    assert len(calls) == 18 and again.rows == record.rows
    needle = [r for r in record.rows if r.get("task") == "needle" and r["window"] == 512]
    assert [(r.get("depth"), r["value"], r["n"]) for r in needle] == [
        (None, pytest.approx(2 / 3), 3),
        (0.0, 1.0, 1),
        (0.1, 0.0, 1),
        (0.2, 1.0, 1),
    ]
    # Wilson's interval of 2 of 3 and of 1 of 1, from the formula by hand.
    assert (needle[0]["low"], needle[0]["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert (needle[1]["low"], needle[1]["high"]) == pytest.approx((0.2065, 1.0), abs=1e-4)
    assert all(r["low"] <= r["value"] <= r["high"] for r in record.rows)
    several = [r for r in record.rows if r.get("task") == "multi_needle" and r.get("depth") is not None]
    assert {r["depth"] for r in several} == {0.1, 0.3, 0.5, 0.7, 0.9} and all(r["n"] == 3 for r in several)
    single = [r for r in record.rows if r.get("task") == "niah_single_2"]
    assert [r["metric"] for r in single] == ["string_match"] * 2 and single[0]["protocol"] == "ruler"
    assert all(e["prompt_tokens"] < e["window"] and e["answer"] for e in record.examples)


def test_what_cannot_be_asked_fails_before_anything_runs(texts: Texts) -> None:
    engine = Engine(tiny_model("llama", vocab_size=len(texts.tokenizer)), texts.tokenizer)
    corpora = {"noise": texts.documents}
    with pytest.raises(ValueError, match="cwe at window 256"):
        plan_parts(engine, corpora, EvaluateConfig(windows=(256,), protocols=("cwe",)))
    with pytest.raises(ValueError, match="qa = qa_1=FILE"):
        plan_parts(engine, corpora, EvaluateConfig(windows=(1024,), protocols=("qa_1",)))
