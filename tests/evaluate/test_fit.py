"""Prompts are as long as they can be and never longer."""

from __future__ import annotations

import numpy as np
import pytest
from texts import character_tokenizer

from e2llm.evaluate.fit import CLOSE, begin_of_text, largest_fit, make_frame


@pytest.mark.parametrize("seed", range(12))
def test_equals_trying_every_size(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(0 if seed % 2 else 1, 40, size=300)  # tokens of each unit
    counts = 7 + np.concatenate([[0], np.cumsum(sizes)])
    limit = int(random.integers(7, counts[-1] + 50))
    calls: list[int] = []

    def encode(size: int) -> list[int]:
        calls.append(size)
        return [0] * int(counts[size])

    found = largest_fit(encode, limit, least=0, most=300, what="test")
    best = max(size for size in range(301) if counts[size] <= limit)
    assert len(found.token_ids) == counts[found.size] <= limit
    assert counts[best] - counts[found.size] <= CLOSE
    assert len(calls) < 25


def test_too_little_room_names_what() -> None:
    with pytest.raises(ValueError, match="vt at window 64: needs 90 tokens at the least, and 34"):
        largest_fit(lambda size: [0] * (90 + size), 34, least=0, most=5, what="vt at window 64")


def test_frames() -> None:
    tokenizer = character_tokenizer()
    assert begin_of_text(tokenizer) is None
    frame = make_frame(tokenizer, chat=False)
    assert frame.encode("ab", " c") == [97, 98, 32, 99]
    with pytest.raises(ValueError, match="no chat template"):
        make_frame(tokenizer, chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}A:"
    assert tokenizer.decode(make_frame(tokenizer, chat=True).encode("ab", " c")) == "<ab>A:c"
    with pytest.raises(ValueError, match="tokenizer = None"):
        make_frame(None, chat=False)
