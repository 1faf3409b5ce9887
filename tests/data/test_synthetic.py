"""The passages are reproducible, hold what they ask for, and never hold the evaluation's wording."""

import hashlib
import re
import uuid
from collections import Counter

import pytest
from transformers import AutoTokenizer

from e2llm.data import synthetic_codes
from e2llm.data.synthetic import GENERATORS, Draw, plant
from e2llm.data.synthetic_codes import (
    FEWEST,
    LONG,
    MOST,
    SHORT,
    alike,
    asks,
    form,
    is_allowed,
    pairs,
    plant_codes,
    statements,
)
from e2llm.evaluate.tasks import UUID_KV
from e2llm.quickstart import TINY

NUM_PASSAGES = 1500
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
UUID_GROUPS = re.compile(r"[a-z0-9]{8}([^a-z0-9])[a-z0-9]{4}\1[a-z0-9]{4}\1[a-z0-9]{4}\1[a-z0-9]{12}", re.IGNORECASE)
# The pairs of uuid_kv, and of the JSON objects that kv_pairs asks, whatever stands in them.
QUOTED_PAIR = re.compile(r'"[^"\n]*"\s*:\s*"')
HOST = "\n".join(f"line {i} of an ordinary text" for i in range(30))


def passages(name: str, seed: int = 7) -> list[str]:
    if name == "plant":
        return [plant(seed, i, HOST) for i in range(NUM_PASSAGES)]
    if name == "plant without quoted pairs":
        return [plant(seed, i, HOST, quoted_pairs=False) for i in range(NUM_PASSAGES)]
    if name == "plant_codes":
        return [plant_codes(seed, i, HOST) for i in range(NUM_PASSAGES)]
    return [GENERATORS[name](seed, i) for i in range(NUM_PASSAGES)]


@pytest.mark.parametrize("name", [*GENERATORS, "plant", "plant without quoted pairs", "plant_codes"])
def test_evaluation_wording_never_occurs(name):
    for text in passages(name):
        assert not re.search(r"pass[\s_-]*key", text, re.IGNORECASE), text
        assert "remember it" not in text.lower(), text
        assert not UUID.search(text), text
        assert not re.search(r"What is the .*\? The .* is", text, re.IGNORECASE), text
        # "X is N" and "N is the X" with exactly five digits
        assert not re.search(r"\bis:? \"?\d{5}(?!\w)", text), text
        assert not re.search(r"(?<!\w)\d{5} is\b", text), text
        # uuid_kv and kv_pairs
        assert not UUID_GROUPS.search(text), text
        assert not re.search(r"corresponding|specified|extract the|\bkey: ?\"", text, re.IGNORECASE), text


def test_the_pattern_of_quoted_pairs_is_the_evaluations():
    assert QUOTED_PAIR.search(UUID_KV.statement)


@pytest.mark.parametrize("name", ["plant without quoted pairs", "plant_codes"])
def test_what_is_planted_in_a_users_text_holds_no_quoted_pairs(name):
    assert not any(QUOTED_PAIR.search(text) for text in passages(name))


def test_what_the_embedded_model_was_trained_on_stays():
    """Digest of the passages as they were before long codes came: the quickstart's figures were measured with them."""
    digest = hashlib.sha256()
    for i in range(400):
        digest.update((plant(0, i, HOST) + GENERATORS["key_values"](0, i) + GENERATORS["copies"](0, i)).encode())
    assert digest.hexdigest() == "ac218064f0365b27e1875e15b972a78928f06f82f93e8dc9409d82de9875e113"


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


@pytest.mark.parametrize(("lengths", "least", "most_groups"), [(LONG, 1000, 8), (SHORT, 200, 3)])
def test_codes_have_many_forms(lengths, least, most_groups):
    forms = [form(Draw(1, i), lengths) for i in range(3000)]
    found = Counter(len(f.code(Draw(2, i))) for i, f in enumerate(forms))
    assert set(found) == set(range(lengths[0], lengths[1] + 1)) and min(found.values()) > 20
    assert len({(f.groups, f.separator) for f in forms}) > least
    assert {f.separator for f in forms} >= {"-", ":", ".", "_", " ", ""}
    assert max(len(f.groups) for f in forms) > most_groups and min(len(f.groups) for f in forms) == 1


def test_two_thirds_of_the_sets_have_short_codes_and_twice_the_facts():
    """Of sets with names and values of one form. Some lengths are those of either kind of set."""
    sets = [facts for i in range(3000) if len(shapes(facts := pairs(Draw(9, i), MOST))) == 1]
    short = [len(facts) for facts in sets if len(facts[0][0]) < LONG[0]]
    long = [len(facts) for facts in sets if len(facts[0][0]) > SHORT[1]]
    below, above = (LONG[0] - SHORT[0]) / (SHORT[1] + 1 - SHORT[0]), (LONG[1] - SHORT[1]) / (LONG[1] + 1 - LONG[0])
    assert len(short) / len(sets) == pytest.approx(2 / 3 * below, abs=0.06)
    assert len(long) / len(sets) == pytest.approx(1 / 3 * above, abs=0.06)
    assert (min(short), max(short), min(long), max(long)) == (2 * FEWEST, 2 * MOST, FEWEST, MOST)


def test_short_codes_ask_more_questions_of_the_same_tokens(monkeypatch):
    """In tokens of the embedded model's tokenizer: sets of short codes take what sets of long ones take, within a
    quarter, and ask twice as many questions."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    host = "\n".join(f"line {i} of an ordinary text" for i in range(300))
    asked: list[str] = []

    def counted(draw, facts):
        found = asks(draw, facts)
        asked.extend(found)
        return found

    def planted(short_sets: float) -> tuple[int, int]:
        monkeypatch.setattr(synthetic_codes, "SHORT_SETS", short_sets)
        asked.clear()
        texts = [plant_codes(2, i, host) for i in range(100)]
        return sum(map(len, tokenizer(texts)["input_ids"])) - 100 * len(tokenizer(host)["input_ids"]), len(asked)

    monkeypatch.setattr(synthetic_codes, "asks", counted)
    (long_tokens, long_asked), (short_tokens, short_asked) = planted(0), planted(1)
    assert short_tokens == pytest.approx(long_tokens, rel=0.25)
    assert short_asked > 1.8 * long_asked


def test_no_code_is_one_of_the_evaluations_values():
    for i in range(50):
        made = uuid.UUID(bytes=Draw(4, i).rng.bytes(16), version=4)
        values = (str(made), str(made).upper(), str(made).replace("-", ":"), str(made).replace("-", "_"))
        assert not any(is_allowed(f"{before}{value}") for value in values for before in ("", "ab", "ab-"))
        assert not is_allowed(made.hex) and is_allowed(str(made)[:-1])
    assert not any(map(is_allowed, ("12345-abcdef-77", "abcdef.12345", "ab 12345 cd"))) and is_allowed("123456-a12345")
    for i in range(4000):
        for code in alike(Draw(5, i), 6, SHORT if i % 2 else LONG):
            assert not re.search(r"(?<!\w)\d{5}(?!\w)", code) and not UUID_GROUPS.search(code)


@pytest.mark.parametrize("lengths", [LONG, SHORT])
def test_names_of_a_set_differ_and_look_alike(lengths):
    same_start = same_end = 0
    for i in range(600):
        found = alike(Draw(3, i), 6, lengths)
        assert len(set(found)) == 6 and len({len(one) for one in found}) == 1
        same_start += len({one[:1] for one in found}) == 1
        same_end += len({one[-1:] for one in found}) == 1
    assert 60 < same_start < 200 and 60 < same_end < 200


def test_codes_asked_for_were_stated():
    """Every code of the last line stands before it, in its own line or in a question."""
    asked = 0
    for text in passages("plant_codes"):
        body, last = text.strip().rsplit("\n", 1)
        codes = re.findall(r"[\w.:/-]*\d[\w.:/-]{5,}", last)
        asked += bool(codes)
        assert all(code.rstrip(".:,;") in body for code in codes), text
    assert asked > NUM_PASSAGES / 2


def test_every_fact_of_a_set_of_codes_can_be_answered():
    """It is stated once, no name or value stands for two, and it is asked for once or twice with its own value."""
    total = twice = two_lines = 0
    for i in range(NUM_PASSAGES):
        draw = Draw(6, i)
        facts = pairs(draw, MOST)
        assert FEWEST <= len(facts) <= 2 * MOST
        assert len({name for name, _ in facts}) == len(facts)
        stated, asked = "\n".join(statements(draw, facts)), asks(draw, facts)
        held = [[fact for fact in facts if holds(line, fact)] for line in asked]
        for name, value in facts:
            assert name in stated and value in stated
        # Short names and values may stand within others; codes never do.
        assert all(held), "a question without a fact"
        counts = Counter(found[0] for found in held if len(found) == 1)
        codes = [fact for fact in facts if min(map(len, fact)) >= 12]
        assert all(1 <= counts[fact] <= 2 for fact in codes), (facts, asked)
        total += len(facts)
        twice += len(asked) - len(facts)
        two_lines += sum("\n" in line for line in asked)
    assert 0.15 * total < twice < 0.3 * total
    assert 0.6 * (total + twice) < two_lines < 0.8 * (total + twice)


def holds(line: str, fact: tuple[str, str]) -> bool:
    return fact[0] in line and fact[1] in line.replace(fact[0], "", 1)


def test_mostly_the_form_does_not_tell_names_from_values():
    """One form: same length, same separators at the same places, in names and values alike."""
    sets = [pairs(Draw(8, i), 6) for i in range(NUM_PASSAGES)]
    assert 0.75 < sum(len(shapes(facts)) == 1 for facts in sets) / len(sets) < 0.87
    assert all(len({code for fact in facts for code in fact}) == 2 * len(facts)
               for facts in sets if len(shapes(facts)) == 1)


def shapes(facts: list[tuple[str, str]]) -> set[str]:
    return {re.sub(r"[0-9A-Za-z]", "x", code) for fact in facts for code in fact}


def test_planted_codes_keep_their_host_and_depend_on_seed_and_index_alone():
    for i in range(50):
        lines = iter(plant_codes(1, i, HOST).split("\n"))
        assert all(line in lines for line in HOST.split("\n"))  # in order
    assert plant_codes(3, 5, HOST) == plant_codes(3, 5, HOST)
    assert len({plant_codes(3, i, HOST) for i in range(50)} | {plant_codes(4, i, HOST) for i in range(50)}) == 100


def test_a_short_host_holds_few_facts_and_a_long_one_more():
    def most(host: str) -> int:
        plain = host.count("\n")
        return max(plant_codes(2, i, host).count("\n") - plain for i in range(200))

    assert most("a line of text\n" * 20) < most("a line of text\n" * 400)
