"""Facts in windows of ordinary text: length and text stay, and nothing is asked that was not said."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, sentences
from test_corpus import build, text_source
from torch.utils.data import DataLoader

import e2llm.data.planted as planted_module
from e2llm.config import load_recipe
from e2llm.config_sections import DataConfig, SourceConfig
from e2llm.data.parts import TextPart, Window
from e2llm.data.planted import ANSWER_TOKENS, CODES, PlantedPart, plant_window
from e2llm.data.sources import Piece
from e2llm.data.tokens import build_store
from e2llm.data.windows import WindowDataset, collate

R = 2048

SETS = 4
"""The usual most."""


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer):
    pieces = [Piece(sentences(i, 400), True, True, False, 1) for i in range(6)]
    folder = tmp_path_factory.mktemp("cache") / "text"
    store = build_store(folder, pieces, tokenizer, name="text", advance=lambda size, tokens: None)
    return TextPart.of(store, np.ones(6, dtype=bool), name="text", weight=2.0)


def window_of(part, number=0):
    return part.windows(R).draw(number, 5)


def test_the_share_of_windows_that_hold_facts(part, tokenizer):
    plain = part.windows(R)
    for share in (0.0, 0.3, 1.0):
        planted = PlantedPart(part, tokenizer, share, SETS)
        windows = planted.windows(R)
        changed = [not np.array_equal(windows.draw(i, 5).tokens, plain.draw(i, 5).tokens) for i in range(120)]
        assert np.mean(changed) == pytest.approx(share, abs=0.13 if 0 < share < 1 else 0)
        assert (planted.name, planted.weight) == ("text", 2.0)


def test_length_type_and_document_starts_stay(part, tokenizer):
    for seed in range(40):
        window = window_of(part, seed)
        planted = plant_window(window, tokenizer, seed, SETS)
        assert planted.tokens.shape == (R,) and planted.tokens.dtype == np.int64 and planted.loss is None
        assert np.array_equal(planted.document_starts, window.document_starts)


def test_the_host_stays_in_order_and_what_is_asked_was_said(part, tokenizer):
    """The window's own lines from its beginning on; each word with a digit in the last new line stands before it."""
    asked = 0
    for seed in range(60):
        window = Window(window_of(part, seed).tokens, None, np.array([0]))
        host = [line for line in tokenizer.decode(window.tokens.tolist()).split("\n") if line]
        planted = tokenizer.decode(plant_window(window, tokenizer, seed, SETS).tokens.tolist()).split("\n")
        assert planted != host
        new = [line for line in planted if not any(own.startswith(line) for own in host)]  # the last may be torn
        kept = [line for line in planted if line and line in set(host)]
        # the end of the host gives way, and its last lines may be cut where text was decoded and joined again
        assert kept[: len(kept) - 3] == host[: len(kept) - 3] and len(kept) > 0.2 * len(host)
        last = re.findall(r"\w*\d\w*", new[-1])
        asked += bool(last)
        assert all("\n".join(new[:-1]).count(word) for word in last), new
    assert asked > 20


def test_the_same_window_everywhere(part, tokenizer):
    dataset = WindowDataset([PlantedPart(part, tokenizer, 0.5, SETS)], window=R, num_samples=12, seed=3)
    here = collate([dataset[i] for i in range(12)])["input_ids"]
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(collate([again[i] for i in range(12)])["input_ids"], here)
    workers = DataLoader(dataset, batch_size=12, num_workers=2, collate_fn=collate)
    assert np.array_equal(next(iter(workers))["input_ids"], here)
    other = WindowDataset([PlantedPart(part, tokenizer, 0.5, SETS)], window=R, num_samples=12, seed=3, start=0)
    assert np.array_equal(other[7]["input_ids"], here[7])


def test_windows_that_can_hold_none_stay_as_they_are(part, tokenizer):
    window = window_of(part)
    for unchanged in (
        Window(window.tokens[:200], None, np.array([0])),
        Window(window.tokens, None, np.arange(0, R, 100)),
        Window(window.tokens, np.ones(R, dtype=bool), np.array([0])),
    ):
        assert plant_window(unchanged, tokenizer, 1, SETS) is unchanged


def test_only_the_longest_document_changes(part, tokenizer):
    window = Window(window_of(part).tokens, None, np.array([0, 500, 1900]))
    planted = plant_window(window, tokenizer, 4, SETS)
    assert np.array_equal(planted.tokens[:500], window.tokens[:500])
    assert np.array_equal(planted.tokens[1900:], window.tokens[1900:])
    assert not np.array_equal(planted.tokens[500:1900], window.tokens[500:1900])


def test_the_evaluations_wording_never_occurs(part, tokenizer):
    for seed in range(100):
        text = tokenizer.decode(plant_window(window_of(part, seed), tokenizer, seed, SETS).tokens.tolist())
        assert not re.search(r"pass[\s_-]*key|remember it", text, re.IGNORECASE)


def test_a_share_of_the_facts_are_codes_and_none_is_a_quoted_pair(part, tokenizer):
    """Codes of 12 characters and more, which other facts do not have, in half of the windows of a single set."""
    code = re.compile(r"(?<![\w-])(?=\S*\d)(?=\S*[A-Za-z])[0-9A-Za-z]+(?:[-:._/][0-9A-Za-z]+)+(?![\w-])")
    single = held = 0
    for seed in range(240):
        text = tokenizer.decode(plant_window(window_of(part, seed), tokenizer, seed, SETS).tokens.tolist())
        assert not re.search(r'"[^"\n]*"\s*:\s*"', text)
        if seed % SETS == 0:  # the seeds of one set
            single += 1
            held += any(len(found[0]) >= 20 for found in code.finditer(text))
    assert 0.08 * single < held < CODES * single + 8


def test_as_many_sets_as_are_asked_for_at_most(part, tokenizer):
    """With one set at most every seed is a seed of one; what is planted into a window of two is more."""
    window = window_of(part)
    host = set(tokenizer.decode(window.tokens.tolist()).split("\n"))

    def new_lines(seed, most):
        text = tokenizer.decode(plant_window(window, tokenizer, seed, most).tokens.tolist())
        return [line for line in text.split("\n") if line not in host]

    one, two = ([len(new_lines(seed, most)) for seed in range(1, 41, 2)] for most in (1, 2))
    assert all(new_lines(seed, 1) == new_lines(seed, 2) for seed in range(0, 20, 2))  # seeds of one set in two
    assert np.mean(two) > 1.4 * np.mean(one)


def test_windows_that_hold_few_tokens_get_fewer_sets(part, tokenizer):
    """A window of 512 tokens with room for one set only is not left without any."""
    changed = 0
    for seed in range(3, 83, SETS):  # seeds of the most sets
        window = Window(window_of(part, seed).tokens[:512], None, np.array([0]))
        planted = plant_window(window, tokenizer, seed, SETS)
        assert planted.tokens.shape == (512,)
        changed += planted is not window
    assert changed > 10


def test_the_first_tokens_of_answers_count_for_more(part, tokenizer, monkeypatch):
    """Text and tokens stay; what counts begins a value that the window states before it, once for every question that
    no later set's lines have torn apart."""
    asked = []

    def spied(*arguments):
        asked.append(arguments[-1])
        return with_facts(*arguments)

    with_facts = planted_module._with_facts
    monkeypatch.setattr(planted_module, "_with_facts", spied)
    found = whole = short = 0
    for seed in range(80):
        asked.clear()
        window = window_of(part, seed)
        plain = plant_window(window, tokenizer, seed, SETS)
        assert plain.weights is None
        asked.clear()
        weighed = plant_window(window, tokenizer, seed, SETS, 4.0)
        assert np.array_equal(weighed.tokens, plain.tokens)
        assert weighed.weights.shape == (R,) and weighed.weights.dtype == np.float32
        assert set(np.unique(weighed.weights)) == {1, 4}
        begins = np.flatnonzero(np.diff(weighed.weights, prepend=1) > 0)
        answers = {one.text[one.start : one.stop] for one in asked[-1]}
        text = tokenizer.decode(weighed.tokens.tolist())
        for begin in begins:
            before = tokenizer.decode(weighed.tokens[:begin].tolist())
            following = text[len(before) :].lstrip(" \"'`<[(")
            told = [answer for answer in answers if following.startswith(answer)]
            assert told, following[:40]
            assert any(before.count(answer) for answer in told), "stated before it is asked for"
            length = int(np.argmin(np.append(weighed.weights[begin:], 1) == 4))
            assert length <= ANSWER_TOKENS
            short += length < ANSWER_TOKENS
        found += len(begins)
        whole += sum(text.count(one.text) > 0 for one in set(asked[-1]))
    assert whole * 0.9 < found <= whole * 1.1 and found > 400 > 10 * short


def test_of_planted_lines_answers_alone_carry_loss(part, tokenizer):
    """Line by line, independent of how lines are told apart there: tokens, weights and the host's own lines as without
    the setting; what is masked are new lines, and what is not masked of a new line is a value with its line's end."""
    masked = kept = 0
    for seed in range(60):
        window = Window(window_of(part, seed).tokens, None, np.asarray([0]))  # as one document: whole lines
        plain = plant_window(window, tokenizer, seed, SETS, 4.0)
        found = plant_window(window, tokenizer, seed, SETS, 4.0, answers_only=True)
        assert np.array_equal(found.tokens, plain.tokens) and np.array_equal(found.weights, plain.weights)
        assert found.loss.shape == (R,) and found.loss.dtype == bool and found.loss[found.weights == 4].all()
        host = tokenizer.decode(window.tokens.tolist()).split("\n")
        own, line, value, heavy = set(host), "", "", False
        for token, carries, weight in zip(found.tokens, found.loss, found.weights, strict=True):
            piece = tokenizer.decode([int(token)])
            line, value, heavy = line + piece, value + piece * bool(carries), heavy or weight == 4
            if "\n" not in piece:
                continue
            if line.strip("\n") in own:
                assert value == line or not line.strip(), line  # every token of a line that was there
            else:
                masked, kept = masked + len(line) - len(value), kept + len(value)
                assert line.endswith(value) and heavy == bool(value), line  # an answer begins here
            line, value, heavy = "", "", False
    assert masked > 2 * kept > 0
    two = Window(window.tokens, None, np.asarray([0, 600]))
    found = plant_window(two, tokenizer, 1, SETS, answers_only=True)
    alone = plant_window(Window(window.tokens[600:], None, np.asarray([0])), tokenizer, 1, SETS, answers_only=True)
    assert found.loss[:600].all() and np.array_equal(found.loss[600:], alone.loss) and not alone.loss.all()
    same = plant_window(Window(window.tokens[:100], None, np.asarray([0])), tokenizer, 0, SETS, answers_only=True)
    assert same.loss is None  # too short for facts: nothing is masked


def test_labels_of_what_carries_no_loss(part, tokenizer):
    parts = [PlantedPart(part, tokenizer, 1.0, SETS, 4.0, answers_only=True)]
    sample = WindowDataset(parts, window=R, num_samples=1, seed=3)[0]
    ignored = sample["labels"] == -100
    assert 0 < ignored.sum() < R // 2 and torch.equal(sample["labels"][~ignored], sample["input_ids"][~ignored])
    assert not (sample["loss_weights"][ignored] > 1).any()


def test_every_sample_has_weights_where_some_have(part, tokenizer):
    parts = [PlantedPart(part, tokenizer, 0.5, SETS, 4.0), part]
    dataset = WindowDataset(parts, window=R, num_samples=12, seed=3)
    batch = collate([dataset[i] for i in range(12)])
    plain = WindowDataset([PlantedPart(part, tokenizer, 0.5, SETS), part], window=R, num_samples=12, seed=3)
    assert np.array_equal(batch["input_ids"], collate([plain[i] for i in range(12)])["input_ids"])
    assert batch["loss_weights"].shape == (12, R) and batch["loss_weights"].dtype == torch.float32
    counted = (batch["loss_weights"] > 1).any(dim=1)
    assert 0 < counted.sum() < 12 and "loss_weights" not in plain[0]


def test_settings(tmp_path, write, tokenizer):
    path = write("text.txt", "==\n".join(sentences(i, 200) for i in range(8)))
    corpus = build(tmp_path, tokenizer, text_source(path, planted=0.4, planted_sets=2), window=512)
    assert isinstance(corpus.train[0], PlantedPart) and (corpus.train[0].share, corpus.train[0].sets) == (0.4, 2)
    assert (corpus.provenance[0]["planted"], corpus.provenance[0]["planted_sets"]) == (0.4, 2)
    assert all(isinstance(held, TextPart) for held in corpus.held_out), "held-out text stays as it is"
    assert "planted" not in build(tmp_path, tokenizer, text_source(path)).provenance[0]
    for options, message in [
        ({"path": "a", "planted_sets": 0}, r"data\.sources\.planted_sets = 0: use at least 1"),
        ({"path": "a", "planted": 1.5}, r"data\.sources\.planted = 1\.5: use a share"),
        ({"synthetic": "copies", "planted": 0.5}, r"data\.sources\.planted = 0\.5: facts are planted in text"),
    ]:
        with pytest.raises(ValueError, match=message):
            SourceConfig(**options)
    recipe = load_recipe("paper", ['data.sources=[{path="a", planted=0.1}]'])
    assert recipe.data.sources[0].planted == 0.1


def test_what_all_sources_have_and_one_has_otherwise(tmp_path, write, tokenizer):
    path = write("text.txt", "==\n".join(sentences(i, 200) for i in range(8)))
    own = ({}, {"planted": 0.0}, {"planted": 0.25, "planted_sets": 1}, {"planted_sets": 3})
    rows = [text_source(path, **options) for options in own]
    rows.append(SourceConfig(synthetic="copies"))
    corpus = build(tmp_path, tokenizer, *rows, window=512, planted=0.5, planted_sets=2)
    found = [(part.share, part.sets) if isinstance(part, PlantedPart) else None for part in corpus.train]
    assert found == [(0.5, 2), None, (0.25, 1), (0.5, 3), None]
    assert [row.get("planted") for row in corpus.provenance] == [0.5, None, 0.25, 0.5, None]
    for options, message in [
        ({"planted": -0.1}, r"data\.planted = -0\.1: use a share between 0 and 1"),
        ({"planted_sets": 0}, r"data\.planted_sets = 0: use at least 1"),
        ({"planted_weight": 0}, r"data\.planted_weight = 0: use a number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataConfig(**options)
    with pytest.raises(ValueError, match=r"data\.planted_weight = 4\.0: only the loss in pieces weighs tokens"):
        load_recipe("recommended-yarn", ["train.logits_tokens=0"])
    without = [["data.planted=0"], ["data.sources=[{path='a', planted=0.0}]"], ["data.planted_weight=1"]]
    recipes = [load_recipe("recommended-yarn", [*one, "train.logits_tokens=0"]) for one in without]
    assert not any(recipe.data.weighs_tokens for recipe in recipes)
    some = load_recipe("recommended-yarn", ["data.sources=[{path='a', planted=0.0}, {path='b', planted=0.1}]"])
    assert some.data.weighs_tokens and load_recipe("recommended-yarn", ["data.sources=[{path='a'}]"]).data.weighs_tokens


def test_the_recommended_recipe_plants_facts_and_the_papers_none():
    shares = {name: load_recipe(name).data.planted for name in ("recommended", "paper", "quickstart")}
    assert shares["recommended"] > 0 and shares["paper"] == shares["quickstart"] == 0


def test_chats_are_refused(tmp_path, write, caplog):
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day " * 40}]}

    path = write("chat.jsonl", "\n".join(json.dumps(chat) for _ in range(20)))
    corpus = build(tmp_path, make_tokenizer(), SourceConfig(path=str(path)), window=32, planted=0.5)
    assert isinstance(corpus.train[0], TextPart) and "planted" not in corpus.provenance[0]
    assert f"data.planted = 0.5: {path} holds chats, in which no facts are planted" in caplog.text
    caplog.clear()
    build(tmp_path, make_tokenizer(), SourceConfig(path=str(path), planted=0.0), window=32, planted=0.5)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"data\.sources\.planted = 0\.5: .* holds chats"):
        build(tmp_path, make_tokenizer(), SourceConfig(path=str(path), planted=0.5), window=32)
