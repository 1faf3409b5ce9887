"""Records of different documents: one table is of one text, or says what is not.

records/ holds two real Records of SmolLM2-135M cut down to one corpus and three windows: `plain` read eight documents,
`planted` those and two more. Expected values are summed here from the Records' examples.
"""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from e2llm.intervals import interval_of_perplexity
from e2llm.records import Record, make_row
from e2llm.report import perplexity_figure, perplexity_table, render_page, results_latex, results_markdown
from e2llm.report.headline import headline
from e2llm.report.series import all_rows, sections, series_of
from e2llm.report.tables import Table, scale_table, window_table

FOLDER = Path(__file__).parent / "records"
WINDOWS = (8192, 65_536, 131_072)
EXTRA = ("napkin_part5.txt", "openlogic_first_order_logic.txt")
NOTE = "On the 8 documents that all checkpoints were measured on. Left out: napkin_part5.txt, openlogic_first"


def plain() -> dict[str, Any]:
    """Eight documents."""
    return json.loads((FOLDER / "smollm2_plain.json").read_text())


def planted() -> dict[str, Any]:
    """The same eight and two more."""
    return json.loads((FOLDER / "smollm2_planted_s0.json").read_text())


def record(document: dict[str, Any]) -> Record:
    return Record(**{key: value for key, value in document.items() if key != "schema"})


def listed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["config"]["corpora"]["mathematics"]["documents"]


def by_hand(document: dict[str, Any], window: int, names: set[str]) -> tuple[float, int, list[float], list[int]]:
    """exp(sum of nats / sum of tokens) over the named documents' examples."""
    nats, tokens = [], []
    for example in document["examples"]:
        if example["window"] == window and example["document"] in names:
            nats.append(example["nats"])
            tokens.append(example["tokens"])
    return math.exp(math.fsum(nats) / sum(tokens)), sum(tokens), nats, tokens


def table_of(*documents: dict[str, Any]) -> Table:
    (section,) = sections(all_rows([record(document) for document in documents]), "perplexity")
    return window_table(section)


def cells(table: Table, checkpoint: str) -> list[Any]:
    return next(found for name, found in table.body if name.startswith(f"{checkpoint} ·"))


def keep(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The Record as if the evaluation had read these documents only."""
    document["config"]["corpora"]["mathematics"]["documents"] = [d for d in listed(document) if d["name"] in names]
    document["examples"] = [e for e in document["examples"] if e["document"] in names]
    for row in document["rows"]:
        row["value"], row["n"], nats, tokens = by_hand(document, row["window"], names)
        row["documents"] = len(names)
        found = interval_of_perplexity(nats, tokens)
        row |= {"low": found.low, "high": found.high} if found else {}
        for end in () if found else ("low", "high"):
            row.pop(end, None)
    return document


def without_examples(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"examples": []}


def names_of(document: dict[str, Any]) -> set[str]:
    return {entry["name"] for entry in listed(document)}


def test_the_fixtures_are_what_the_tests_say():
    assert names_of(planted()) - names_of(plain()) == set(EXTRA) and len(names_of(plain())) == 8


def test_values_are_of_the_shared_documents():
    rows = all_rows([record(planted()), record(plain())])
    for row in rows:
        own = planted() if row["checkpoint"] == "recommended+planted" else plain()
        value, n, nats, tokens = by_hand(own, row["window"], names_of(plain()))
        assert row["value"] == pytest.approx(value, rel=1e-12)
        assert (row["n"], row["documents"]) == (n, 8)
        interval = interval_of_perplexity(nats, tokens)
        assert (row["low"], row["high"]) == (interval.low, interval.high)
    before = {row["window"]: row["value"] for row in planted()["rows"]}
    assert all(row["value"] > before[row["window"]] * 1.02 for row in rows[:3]), "two easy documents are gone"
    after = [row["value"] for row in rows[3:]]
    assert after == [row["value"] for row in plain()["rows"]], "to the last bit: all its documents are shared"


def test_intervals_are_of_the_shared_documents():
    """Against a bootstrap with other draws."""
    draw = random.Random(1)
    row = all_rows([record(planted()), record(plain())])[0]
    _, _, nats, tokens = by_hand(planted(), row["window"], names_of(plain()))
    means = []
    for _ in range(4000):
        chosen = [draw.randrange(8) for _ in range(8)]
        means.append(math.exp(sum(nats[i] for i in chosen) / sum(tokens[i] for i in chosen)))
    means.sort()
    assert row["low"] == pytest.approx(means[100], rel=0.02)
    assert row["high"] == pytest.approx(means[3899], rel=0.02)


def test_every_form_shows_them_and_says_so():
    records = [record(planted()), record(plain())]
    shown = []
    for window in WINDOWS:
        of_planted, of_plain = (by_hand(d, window, names_of(plain()))[0] for d in (planted(), plain()))
        shown.append((f"{of_planted:.2f}", f"{of_plain:.2f}" if of_plain < 9.995 else f"{of_plain:.1f}"))
    markdown, page, latex = results_markdown(records), render_page(records), results_latex(records)
    table = perplexity_table(records)
    assert table in markdown
    plain_form = table.replace("\\_", "_")
    assert "order_logic.txt.\n\nScales other than 1" in plain_form
    assert f"| target tokens | {' | '.join(['1,048,320'] * 3)} |" in table
    for text, note in ((plain_form, NOTE), (page, NOTE), (latex, NOTE.replace("_", r"\_"))):
        assert note in text
        for values in shown:
            assert all(value in text for value in values)
    figure = perplexity_figure(*sections(all_rows(records), "perplexity"))
    assert NOTE in figure.description and "other documents" not in figure.description
    assert f"{shown[0][0]} at 8k, {shown[2][0]} at 128k" in figure.description


def test_documents_are_known_by_what_they_hold_and_not_by_name():
    renamed = planted()
    for entry in [*listed(renamed), *renamed["examples"]]:
        name = "name" if "name" in entry else "document"
        entry[name] = f"folder/{entry[name]}"
    assert [cell.text for cell in cells(table_of(renamed, plain()), "recommended+planted")] == [
        cell.text for cell in cells(table_of(planted(), plain()), "recommended+planted")
    ]


@pytest.mark.parametrize("change", ["text", "tokens"])
def test_what_was_read_otherwise_is_another_document(change):
    """The same name with another text, or with another number of target tokens."""
    other = planted()
    if change == "text":
        listed(other)[0]["sha256"] = "0" * 64
    else:
        for row in other["rows"]:
            changed = next(e for e in other["examples"] if e["window"] == row["window"])
            assert changed["document"] == listed(other)[0]["name"]
            changed["tokens"] -= 16
            row["value"], row["n"], *_ = by_hand(other, row["window"], names_of(other))
    left = names_of(plain()) - {listed(plain())[0]["name"]}
    rows = all_rows([record(other), record(plain())])
    assert {row["documents"] for row in rows} == {7}
    for row, own in ((rows[0], other), (rows[3], plain())):
        assert row["value"] == pytest.approx(by_hand(own, 8192, left)[0], rel=1e-12)


def test_documents_in_common_and_none_of_them_alone():
    """Two Records of which neither holds the other's documents; with one document in common there is no interval."""
    names = sorted(names_of(plain()))
    first, second = keep(plain(), set(names[:5])), keep(planted(), {*names[4:], EXTRA[0]})
    rows = all_rows([record(first), record(second)])
    for row, own in zip(rows, [plain()] * 3 + [planted()] * 3, strict=True):
        assert row["value"] == pytest.approx(by_hand(own, row["window"], {names[4]})[0], rel=1e-12)
        assert row["documents"] == 1 and "low" not in row and "high" not in row
    assert "On the one document that all checkpoints were measured on." in perplexity_table(
        [record(first), record(second)]
    )


def test_an_interval_within_the_one_shared_document_stays():
    """One Record read that document alone and has its interval; the other one's was over several, and goes."""
    name = sorted(names_of(plain()))[0]
    alone = keep(plain(), {name})
    for row in alone["rows"]:
        row |= {"low": row["value"] - 0.1, "high": row["value"] + 0.1, "interval": "blocks"}
    rows = all_rows([record(alone), record(plain())])
    for row, own in zip(rows, alone["rows"], strict=False):
        assert [row[k] for k in ("low", "high", "interval")] == [own[k] for k in ("low", "high", "interval")]
    assert not any({"low", "high", "interval"} & row.keys() for row in rows[3:])


def test_nothing_in_common_is_marked_and_never_the_best():
    """Eight documents against the two others, which are far easier: their values stay, marked."""
    other = keep(planted(), set(EXTRA))
    table = table_of(plain(), other)
    values = [f"{by_hand(planted(), window, set(EXTRA))[0]:.2f}" for window in WINDOWS]
    assert [(c.text, c.mark, c.best) for c in cells(table, "recommended+planted")] == [(v, "†", False) for v in values]
    assert [(c.mark, c.best) for c in cells(table, "plain")] == [("", False)] * 3
    note = table.notes[0]
    assert note.startswith("† recommended+planted · yarn (2 documents): on other documents")
    records = [record(plain()), record(other)]
    assert f"| {values[0]}† (" in results_markdown(records)
    assert f"{values[0]}<sup>†</sup>" in render_page(records) and note in render_page(records)
    assert rf"{values[0]}\textsuperscript{{†}}" in results_latex(records)
    figure = perplexity_figure(*sections(all_rows(records), "perplexity"))
    assert "recommended+planted · yarn, other documents: " in figure.description and note in figure.description
    assert "plain · yarn: " in figure.description


def test_the_headline_compares_one_text_only():
    base = plain()
    base["config"]["checkpoint"] = "base"
    for row in base["rows"]:
        row |= {"checkpoint": "base", "method": "none"}
    other = keep(planted(), set(EXTRA))

    def said(*documents: dict[str, Any]) -> str:
        return headline(all_rows([record(d) for d in documents]), 2).sentence

    hand = [by_hand(d, 131_072, names_of(plain()))[0] for d in (plain(), planted())]
    assert said(base, planted()) == f"At 131,072 tokens, perplexity {hand[0]:.1f} → {hand[1]:.2f}"
    assert "→" not in said(base, other)


def test_a_record_without_values_by_document_is_marked_and_the_others_meet():
    third = keep(planted(), names_of(plain()))
    best = all_rows([record(planted()), record(plain())])
    for row, same in zip(third["rows"], best, strict=False):
        row |= {"checkpoint": "third", "value": same["value"]}
    table = table_of(planted(), plain(), without_examples(third))
    assert [(cell.mark, cell.best) for cell in cells(table, "third")] == [("†", False)] * 3
    assert cells(table, "recommended+planted")[2].best
    assert [cell.text for cell in cells(table, "third")] == [f"{row['value']:.2f}" for row in third["rows"]]
    assert [cell.text for cell in cells(table, "recommended+planted")] == [
        f"{by_hand(planted(), window, names_of(plain()))[0]:.2f}" for window in WINDOWS
    ]
    assert table.notes[0].startswith("On the 8 documents that all unmarked checkpoints were measured on. Left out:")
    assert table.notes[1].startswith("† third · yarn (8 documents): on documents that the Record holds no values of")


def test_examples_that_do_not_make_the_row_are_not_used():
    wrong = planted()
    wrong["examples"][0]["nats"] *= 1.001
    table = table_of(wrong, plain())
    assert [cell.mark for cell in cells(table, "recommended+planted")] == ["†", "", ""]
    assert cells(table, "recommended+planted")[0].text == f"{wrong['rows'][0]['value']:.2f}"


def test_only_records_that_hold_a_window_count_there():
    short = plain()
    for name in ("rows", "examples"):
        short[name] = [entry for entry in short[name] if entry["window"] != 131_072]
    table = table_of(planted(), short)
    ours = cells(table, "recommended+planted")
    assert ours[1].text == f"{by_hand(planted(), 65_536, names_of(plain()))[0]:.2f}"
    assert ours[2].text == f"{by_hand(planted(), 131_072, names_of(planted()))[0]:.2f}"
    assert table.foot == ("target tokens", ["1,048,320", "1,048,320", "1,310,400"])
    assert table.notes[0].startswith("At 8k, 64k: on the 8 documents that all checkpoints were measured on.")


def test_the_same_documents_change_nothing():
    again = keep(planted(), names_of(plain()))
    unsaid = [without_examples(plain()), without_examples(again)]
    for first, second in ([plain(), again], unsaid):
        rows = all_rows([record(first), record(second)])
        assert [{k: v for k, v in row.items() if k != "source"} for row in rows] == first["rows"] + second["rows"]
        assert [note for note in table_of(first, second).notes if not note.startswith("Scales")] == []


def test_checkpoints_of_one_record_are_told_apart():
    """Examples do not say whose they are: one Record holds both checkpoints, as the quickstart's does."""
    both, first, second = plain(), plain(), planted()
    both["rows"] = first["rows"] + second["rows"]
    both["examples"] = first["examples"] + second["examples"]
    both["config"] = {"evaluate": {"corpora": second["config"]["corpora"]}}
    rows = all_rows([record(both)])
    for row, own in zip(rows, [plain()] * 3 + [planted()] * 3, strict=True):
        assert row["value"] == pytest.approx(by_hand(own, row["window"], names_of(plain()))[0], rel=1e-12)


def test_other_tables_do_not_count():
    """Another corpus, protocol or base model, a calibration, a choice of scales: never in the same table."""
    for change in ({"corpus": "novels"}, {"protocol": "sliding"}, {"base_model": "other"}, {"choice": "fixed"}):
        other = planted()
        other["rows"] = [row | change for row in other["rows"]]
        other["examples"] = [e | {k: v for k, v in change.items() if k in e} for e in other["examples"]]
        rows = all_rows([record(plain()), record(other)])
        assert [(row["value"], row["n"]) for row in rows[3:]] == [(row["value"], row["n"]) for row in other["rows"]]
    calibration = record(planted() | {"kind": "calibrate"})
    assert [row["documents"] for row in all_rows([record(plain()), calibration])] == [8] * 3 + [10] * 3


def test_rows_of_other_metrics_stay():
    first, second = plain(), planted()
    for document in (first, second):
        asked = {name: document["rows"][0][name] for name in ("base_model", "checkpoint", "method", "corpus", "window")}
        document["rows"] += [
            make_row("string_match", 0.5, "share", document["rows"][0]["documents"], **asked, task="vt", scale=1.0),
            make_row("loss", 2.0, "nats", document["rows"][0]["documents"], **asked, position=7, protocol="position"),
        ]
    rows = [row for row in all_rows([record(first), record(second)]) if row["metric"] != "perplexity"]
    kept = [{k: v for k, v in row.items() if k not in ("source", "native_window")} for row in rows]
    assert kept == first["rows"][3:] + second["rows"][3:]


def test_a_table_of_scales_says_it_too():
    """`plain` alone, at two scales a window: all its documents are shared, so that nothing of it is left out."""
    grid = plain()
    for scale in (16.0, 32.0):
        grid["rows"] += [row | {"scale": scale} for row in plain()["rows"] if row["scale"] != scale]
        grid["examples"] += [e | {"scale": scale} for e in plain()["examples"] if e["scale"] != scale]
    (section,) = sections(all_rows([record(planted()), record(grid)]), "perplexity")
    tables = [scale_table(section, one) for one in series_of(section)]
    (notes,) = [table.notes for table in tables if table]
    assert notes == ("On the 8 documents that all checkpoints were measured on.",)


def test_two_calibrations_meet():
    """Their rows are of a protocol that their examples do not have."""
    records = [record(d | {"kind": "calibrate"}) for d in (plain(), planted())]
    assert {row["documents"] for row in all_rows(records)} == {8}


def test_names_of_series_do_not_tell_documents_apart():
    """Two seeds of one checkpoint on ten and on eight documents."""
    second = keep(copy.deepcopy(planted()), names_of(plain()))
    (section,) = sections(all_rows([record(planted()), record(second)]), "perplexity")
    labels = [f"recommended+planted · yarn · source evaluate #{number}" for number in (1, 2)]
    assert [one.label for one in series_of(section)] == labels
