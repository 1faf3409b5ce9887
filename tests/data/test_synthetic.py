"""The passages are reproducible, hold what they ask for, and never hold the evaluation's wording."""

import re

import pytest

from e2llm.data.synthetic import GENERATORS, plant

NUM_PASSAGES = 1500
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
HOST = "\n".join(f"line {i} of an ordinary text" for i in range(30))


def passages(name: str, seed: int = 7) -> list[str]:
    if name == "plant":
        return [plant(seed, i, HOST) for i in range(NUM_PASSAGES)]
    return [GENERATORS[name](seed, i) for i in range(NUM_PASSAGES)]


@pytest.mark.parametrize("name", [*GENERATORS, "plant"])
def test_evaluation_wording_never_occurs(name):
    for text in passages(name):
        assert not re.search(r"pass[\s_-]*key", text, re.IGNORECASE), text
        assert "remember it" not in text.lower(), text
        assert not UUID.search(text), text
        assert not re.search(r"What is the .*\? The .* is", text, re.IGNORECASE), text
        # "X is N" and "N is the X" with exactly five digits
        assert not re.search(r"\bis:? \"?\d{5}(?!\w)", text), text
        assert not re.search(r"(?<!\w)\d{5} is\b", text), text


@pytest.mark.parametrize("name", GENERATORS)
def test_same_seed_and_index_same_passage(name):
    make = GENERATORS[name]
    assert make(3, 5) == make(3, 5)
    assert len({make(3, i) for i in range(50)} | {make(4, i) for i in range(50)}) == 100


@pytest.mark.parametrize("name", GENERATORS)
def test_lengths(name):
    lengths = [len(text) for text in passages(name)]
    assert min(lengths) >= 120
    assert max(lengths) <= 1700
    assert 400 < sum(lengths) / len(lengths) < 1100


def test_last_line_of_key_values_was_stated_before():
    """Every word with a digit in the closing line stands earlier: nothing is asked that was not stated."""
    asked = 0
    for text in passages("key_values"):
        body, last = text.strip().rsplit("\n", 1)
        words = re.findall(r"\w*\d\w*", last)
        asked += bool(words)
        assert all(word in body for word in words), text
    assert asked > NUM_PASSAGES / 2


def test_copies_repeat():
    """A run of six items from the last line stands earlier, word for word."""
    for text in passages("copies")[:300]:
        words = text.split()
        tail = " ".join(words[-3:])
        assert len(words) < 8 or " ".join(words).count(tail) >= 2 or len(text) >= 1500, text


def test_digit_lengths_vary():
    found = {len(n) for text in passages("key_values") for n in re.findall(r"(?<=is )\d+(?=\.)", text)}
    assert {3, 4, 6, 7, 8} <= found and 5 not in found


def test_planted_text_keeps_its_host():
    for i in range(50):
        lines = iter(plant(1, i, HOST).split("\n"))
        assert all(line in lines for line in HOST.split("\n"))  # in order
