"""A tokenizer that cannot write what is asked or read is refused by name, before anything is measured."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import tiny_model
from ruler_texts import word_texts, word_tokenizer
from texts import byte_tokenizer, random_documents

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document, load_documents
from e2llm.evaluate.protocols import question_kinds
from e2llm.evaluate.questions import Texts
from e2llm.evaluate.retrieval import make_prompts
from e2llm.evaluate.run import plan_parts
from e2llm.evaluate.tasks import TASKS
from e2llm.evaluate.writable import check_known, check_writes, encode
from e2llm.infer import Engine


def tokenizer_of(known: str, *, unknown: str | None = "<unk>", declared: bool = True, lower: bool = False) -> Any:
    """One token a character of `known`; others become `unknown`, or nothing at all."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<pad>": 1, "<s>": 2} | {letter: code for code, letter in enumerate(known, start=3)}
    if unknown is None:
        core = Tokenizer(models.BPE(vocabulary, merges=[]))
    else:
        core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    if lower:
        core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    named = {"unk_token": unknown} if declared and unknown is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", clean_up_tokenization_spaces=False, **named
    )


def uncased() -> Any:
    """BERT's way: small letters, no accents, pieces whose decoding puts a space on both sides of a hyphen."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*string.printable.strip().lower(), *(f"##{c}" for c in string.ascii_lowercase + string.digits)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["[UNK]", "[PAD]", *pieces]))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")


WHOLE = string.printable
NO_SEVEN = WHOLE.replace("7", "")


def ask(tokenizer: Any, task: str, count: int = 20) -> list[Any]:
    return make_prompts(tokenizer, random_documents(1, 900), window=900, num_prompts=count, seed=0, task=TASKS[task])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_facts_that_cannot_be_written_are_refused(task: str, unknown: str | None) -> None:
    """One digit is missing: too little of a prompt to show by its characters, and every value with it is lost."""
    with pytest.raises(
        ValueError, match=rf"{task}, prompt \d+ of window 900: the tokenizer cannot encode .*leave it out"
    ):
        ask(tokenizer_of(NO_SEVEN, unknown=unknown), task)
    assert len(ask(tokenizer_of(WHOLE, unknown=unknown), task)) == 20
    with pytest.raises(ValueError, match=rf"{task}, prompt 0 .*of its characters are lost \(t"):
        ask(tokenizer_of(WHOLE.replace("t", ""), unknown=unknown), task)


def test_small_letters_and_other_spaces_are_no_loss() -> None:
    assert len(ask(tokenizer_of(WHOLE.lower(), lower=True), "pass_key")) == 20
    assert len(ask(uncased(), "pass_key")) == 20
    assert len(ask(byte_tokenizer(), "uuid_kv")) == len(ask(word_tokenizer(), "uuid_kv")) == 20
    # It reads a UUID back as "0a - 1b": no answer of its could be right.
    with pytest.raises(ValueError, match=r"uuid_kv, prompt 0 .*writes the answer .* - .*which does not count"):
        ask(uncased(), "uuid_kv")


def test_every_window_and_prompt_is_looked_at_before_the_first_forward_pass() -> None:
    """The first prompt of the smallest window can be written, a later one cannot."""
    tokenizer = tokenizer_of(NO_SEVEN)
    engine = Engine(tiny_model("llama"), tokenizer)
    values = {
        (seed, window): TASKS["pass_key"].draw(np.random.default_rng([seed, window, 0]))[1]
        for seed in range(40)
        for window in (450, 900)
    }
    seed = next(seed for seed, window in values if "7" not in values[seed, 450] and "7" in values[seed, 900])
    corpora = {"noise": random_documents(1, 900)}
    plan_parts(engine, corpora, EvaluateConfig(windows=(450,), protocols=("pass_key",), prompts=1, seed=seed))
    with pytest.raises(ValueError, match=rf"pass_key, prompt 0 of window 900: .*cannot encode '{values[seed, 900]}'"):
        plan_parts(engine, corpora, EvaluateConfig(windows=(450, 900), protocols=("pass_key",), prompts=1, seed=seed))
    config = EvaluateConfig(windows=(450,), protocols=("pass_key",), prompts=40, seed=seed)
    with pytest.raises(ValueError, match=r"pass_key, prompt [1-9]\d* of window 450"):
        plan_parts(engine, corpora, config)
    with pytest.raises(ValueError, match=r"uuid_kv, prompt \d of window 900"):
        plan_parts(engine, corpora, EvaluateConfig(windows=(900,), protocols=("attention",), prompts=4))


@pytest.mark.parametrize("kind", ["needle", "multi_needle", "kv_pairs", "niah_single_1", "niah_multikey_3", "vt"])
def test_questions_that_cannot_be_written_are_refused(kind: str) -> None:
    gone = {"vt": "Q"}.get(kind, "7")
    text = word_tokenizer().decode(word_texts().documents[0].tokens[:6000].tolist())
    for known, fits in ((WHOLE, True), (WHOLE.replace(gone, ""), False)):
        tokenizer = tokenizer_of(known)
        document = Document("a.txt", np.asarray(encode(tokenizer, text[:16_384]), dtype=np.int32))
        config = EvaluateConfig(windows=(4096, 8192), protocols=(kind,), prompts=8)
        engine = Engine(tiny_model("llama"), tokenizer)
        if fits:
            assert len(plan_parts(engine, {"noise": [document]}, config)) == 2
            continue
        with pytest.raises(ValueError, match=rf"{kind}, question \d of window 4096: the tokenizer .*; use a model"):
            plan_parts(engine, {"noise": [document]}, config)


def test_one_spelling_of_an_answer_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    texts = Texts(word_texts().documents, tokenizer_of(WHOLE))
    engine = Engine(tiny_model("llama"), texts.tokenizer)

    def plan(answers: list[str]) -> list[Any]:
        asked = {"question": "Who?", "answers": answers}
        file.write_text("\n".join(json.dumps(asked | {"documents": [f"{i} is not. " * 90]}) for i in range(30)))
        config = EvaluateConfig(windows=(4096,), protocols=("qa_1",), prompts=2, qa={"qa_1": str(file)})
        return plan_parts(engine, {"noise": texts.documents}, config)

    assert len(plan(["Zoë", "Zoe"])) == 1
    question_kinds.cache_clear()  # the same file with other answers
    with pytest.raises(ValueError, match=r"qa_1, question 0 of window 4096: .*writes the answer 'Zoë' as ' Zo'"):
        plan(["Zoë"])
    question_kinds.cache_clear()


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_of_unknown_tokens_are_refused(tmp_path: Path, streamed: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("e2llm.evaluate.documents.STREAM_TOKENS", 100 if streamed else 10**6)
    few, many = "a" * 990 + "é" * 10, "a" * 989 + "é" * 11
    (tmp_path / "few.txt").write_text(few + "é" * 500, encoding="utf-8")  # what is not used does not count
    for declared in (True, False):
        (found,) = load_documents(tmp_path / "few.txt", tokenizer_of(WHOLE, declared=declared), num_tokens=1000)
        assert (found.tokens == 0).sum() == 10
    (tmp_path / "many.txt").write_text(many, encoding="utf-8")
    for declared in (True, False):
        tokenizer = tokenizer_of(WHOLE, declared=declared)
        with pytest.raises(
            ValueError, match=r"document many\.txt: .*1\.1% of its 1000 tokens are the unknown .*\(é …\)"
        ):
            load_documents(tmp_path, tokenizer, num_tokens=1000)
        assert len(load_documents(tmp_path, tokenizer, num_tokens=1000, max_documents=1)) == 1
    # A byte-level tokenizer writes everything.
    assert len(load_documents(tmp_path, byte_tokenizer(), num_tokens=900)) == 2


def test_documents_whose_text_is_dropped_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("段落 of text " * 200, encoding="utf-8")
    with pytest.raises(ValueError, match=r"document a\.txt: .*of its characters are lost \(段 落 …\); use a model"):
        load_documents(tmp_path, tokenizer_of(WHOLE, unknown=None), num_tokens=1000)
    assert len(load_documents(tmp_path, byte_tokenizer(), num_tokens=1000)) == 1


def test_no_text_loses_nothing() -> None:
    tokenizer = tokenizer_of(WHOLE)
    check_writes(tokenizer, "", [])
    check_known(tokenizer, np.zeros(0, dtype=np.int32), "")
