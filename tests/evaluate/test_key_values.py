"""Objects of UUIDs: valid JSON with the asked pair in its place; the paper's files as they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from texts import character_tokenizer, random_documents

from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.key_values import kv_kind, read_pairs
from e2llm.evaluate.questions import Texts, judge, make_question


def parsed(text: str) -> tuple[dict[str, str], str]:
    data = text.partition("JSON data:\n")[2].partition("\n\nKey: ")
    return json.loads(data[0]), data[2].partition('"\n')[0].strip('"')


@pytest.fixture
def texts() -> Texts:
    return Texts(random_documents(1, 64), character_tokenizer())


def test_generated_objects_fill_the_window_to_less_than_a_pair(texts: Texts) -> None:
    frame = make_frame(texts.tokenizer, False)
    for index in range(10):
        question = make_question(kv_kind(), texts, frame, window=4096, index=index, seed=3)
        pairs, key = parsed(texts.tokenizer.decode(question.token_ids))
        assert pairs[key] == question.expected[0]
        assert list(pairs).index(key) == round(question.depths[0] * (len(pairs) - 1))
        assert question.depths[0] * 10 // 1 == index
        left = 4096 - question.answer_tokens - len(question.token_ids)
        assert 0 <= left < 83  # one pair and its line, a character a token


def test_the_papers_files(tmp_path: Path, texts: Texts) -> None:
    random = np.random.default_rng(0)
    rows = [[(f"k{i}{j}{random.integers(100)}", f"v{i}{j}") for j in range(6)] for i in range(3)]
    path = tmp_path / "kv.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"ordered_kv_records": row}) + "\n" for row in rows)
    assert read_pairs(path) == rows
    kind = kv_kind((str(path),))
    for index in range(12):
        question = make_question(kind, texts, make_frame(texts.tokenizer, False), window=512, index=index, seed=0)
        pairs, key = parsed(texts.tokenizer.decode(question.token_ids))
        assert sorted(pairs.items()) == sorted(rows[index % 3]) and pairs[key] == question.expected[0]
        assert list(pairs).index(key) == round(question.depths[0] * 5)
    with pytest.raises(ValueError, match=r"kv_pairs at window 256: needs"):
        make_question(kind, texts, make_frame(texts.tokenizer, False), window=256, index=0, seed=0)


@pytest.mark.parametrize("content", ["", "{}\n", '{"ordered_kv_records": [["a", "b"]]}\n', "[\n"])
def test_malformed_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        kv_kind((str(path),))


def test_an_answer_counts_when_it_holds_the_value(texts: Texts) -> None:
    question = make_question(kv_kind(), texts, make_frame(texts.tokenizer, False), window=2048, index=0, seed=0)
    value = question.expected[0]
    assert judge(kv_kind(), question, f' "{value.upper()}"').score == 1.0
    assert judge(kv_kind(), question, f' "{value[:-1]}"').score == 0.0
