"""The quickstart's tokenizer and one long text in words, for questions over text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

import e2llm
from e2llm.evaluate.documents import Document
from e2llm.evaluate.questions import Texts


@functools.cache
def word_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(e2llm.__file__).parent / "assets" / "tiny-512")


@functools.cache
def word_texts() -> Texts:
    """One document of 66,000 tokens in sentences of nine words out of 400."""
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, 4)) for _ in range(400)]
    sentences = [" ".join(random.choice(words, 9)).capitalize() + "." for _ in range(1500)]
    tokenizer = word_tokenizer()
    ids = tokenizer(" ".join(sentences), add_special_tokens=False, verbose=False).input_ids
    return Texts([Document("a.txt", np.asarray(ids, dtype=np.int32))], tokenizer)
