"""Documents and prompts of millions of tokens take what one prompt takes, however many there are or long a file is."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import tiny_model
from texts import character_tokenizer

from e2llm.evaluate import batched, question_rows, retrieval
from e2llm.evaluate.batched import groups
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document, load_documents
from e2llm.evaluate.questions import Texts
from e2llm.evaluate.retrieval import prompt_maker
from e2llm.evaluate.run import evaluate
from e2llm.evaluate.running import RunningWords
from e2llm.infer import Engine

MILLION = 1_000_000
BYTES_A_TOKEN = 100
"""Of a prompt that is being made: its numbers (28 bytes and 8 for the place in a list) and a few copies of places."""


@contextmanager
def peak(found: list[int]) -> Iterator[None]:
    """Bytes that Python and numpy allocated on top of what was there, at the most."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_a_prompt_of_a_million_tokens_fills_its_window_and_is_held_alone() -> None:
    """A document of four million: the prompts of a part one after the other take no more than one."""
    tokens = np.random.default_rng(0).integers(40, 120, 4 * MILLION).astype(np.int32)
    make = prompt_maker(character_tokenizer(), [Document("long.txt", tokens)], window=MILLION, seed=0)
    bytes_of: list[int] = []
    with peak(bytes_of):
        for index in range(3):
            prompt = make(index)
            assert len(prompt.token_ids) + prompt.answer_tokens == MILLION
            kept = prompt.without_tokens()
            assert kept.prompt_tokens == len(prompt.token_ids) and not kept.token_ids
            del prompt
    assert bytes_of[0] < BYTES_A_TOKEN * MILLION


class _Alive:
    """Counts prompts that were made and are still held."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.most = 0

    def watch(self, prompt: Any) -> Any:
        import weakref

        self.held.add(id(prompt))
        weakref.finalize(prompt, self.held.discard, id(prompt))
        self.most = max(self.most, len(self.held))
        return prompt


@pytest.mark.parametrize("protocol", ["pass_key", "needle", "attention"])
def test_a_part_holds_one_prompt_with_its_tokens(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = _Alive()
    module, name = (question_rows, "make_question") if protocol == "needle" else (retrieval, "_prompt")
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **named: alive.watch(real(*given, **named)))
    text = "".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}. " for i in range(500))
    tokenizer = character_tokenizer()
    document = Document("a.txt", np.asarray(tokenizer(text).input_ids, dtype=np.int32))
    config = EvaluateConfig(windows=(640,), protocols=(protocol,), prompts=5, base_model="tiny")
    record = evaluate(Engine(tiny_model("llama"), tokenizer), {"words": [document]}, config)
    assert record.rows[0]["n"] == 5 and len(record.examples) >= 5
    assert 1 <= alive.most <= 2  # the next one is made before the last one's name is given away


@pytest.mark.parametrize(("window", "batch", "size"), [(10**6, 1, 1), (4096, 8, 128), (10**6, 8, 8), (65_536, 4, 32)])
def test_prompts_that_are_asked_together_are_few(window: int, batch: int, size: int) -> None:
    found = list(groups(range(200), window=window, batch=batch))
    assert [index for group in found for index in group] == list(range(200))
    assert max(map(len, found)) == size and (size == batch or size * window <= batched.HELD_TOKENS)


def test_running_words_are_the_words_of_the_text() -> None:
    draw = np.random.default_rng(1)
    for text in ("", "  ", " a", *("".join(draw.choice(list("ab \n\té"), 60)) for _ in range(50))):
        expected, found = re.findall(r"\S+\s*", text), RunningWords(text)
        assert len(found) == len(expected) and list(found) == expected
        start, stop = (int(i) for i in draw.integers(-5, 40, 2))
        assert found[start:stop] == expected[start:stop] and found.beginning(7) == "".join(expected[:7])


def test_running_text_takes_few_bytes_a_word() -> None:
    """Strings of their own take 60 bytes each."""
    size = 100_000
    documents = [Document(f"{i}.txt", np.full(size, 97, np.int32)) for i in range(12)]
    for document in documents:
        document.tokens[4::5] = 32

    class Decoder:
        def decode(self, ids: Sequence[int]) -> str:
            return bytes(ids).decode()

    texts, words, found = Texts(documents, Decoder()), size // 5, []
    with peak(found):
        held = [len(texts.running(index)) for index in range(24)]
    assert held == [words] * 24
    # Two documents: text and places; one more that is being decoded, with its list of small numbers and bytes.
    assert found[0] < 3 * (size + 2 * 8 * words) + 12 * size


def test_of_a_long_file_the_part_that_is_asked_for_is_read(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_bytes(b"some words \n" * MILLION + b"\xff")
    found: list[int] = []
    with peak(found):
        documents = load_documents(file, character_tokenizer(), num_tokens=10_000)
    assert len(documents[0].tokens) == 10_000 and found[0] < 2 * MILLION
    file.write_bytes(b"a" * (1 << 20) + "é".encode()[:1])
    with pytest.raises(ValueError, match=rf"no UTF-8 text at byte {1 << 20}:"):
        load_documents(file, character_tokenizer(), num_tokens=2 << 20)
