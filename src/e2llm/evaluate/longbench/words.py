"""Chinese text into words, by the segmenter that LongBench's published scores were made with."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any


@functools.cache
def segmenter() -> Any:
    """A jieba segmenter with its own dictionary as shipped; ValueError with the install line where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its escapes and its look for pkg_resources; it sees no releases any more
        try:
            import jieba
        except ModuleNotFoundError as error:
            raise ValueError(
                f"Chinese tasks are scored on words: {error.name} is not installed: pip install 'e2llm[evaluate]'"
            ) from error
        jieba.setLogLevel(logging.WARNING)
        found = jieba.Tokenizer()
        found.initialize()
    return found


def chinese_words(text: str) -> list[str]:
    """Words of `text` in order, white space and punctuation among them."""
    return list(segmenter().cut(text, cut_all=False))
