"""RULER, use of context, choice of scale, attention: what stands in a table, what is marked, what is drawn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from e2llm.records import Record, make_row
from e2llm.report import render_page, results_markdown
from e2llm.report.attention import FLOOR, attention_figures, attention_tables
from e2llm.report.canvas import NARROW, WIDE
from e2llm.report.choice import choice_tables
from e2llm.report.context import metric_tables, position_figure, position_sections, position_table
from e2llm.report.native import FAILED, MARK
from e2llm.report.palette import LIGHT
from e2llm.report.ruler import ruler_tables
from e2llm.report.series import all_rows, sections

BASE: dict[str, Any] = {"base_model": "tiny", "method": "yarn", "corpus": "novels", "native_window": 4096}


def row(metric: str, value: float, window: int, checkpoint: str = "base", unit: str = "share", **labels: Any) -> Any:
    scale = labels.pop("scale", max(1.0, window / 4096))
    return make_row(metric, value, unit, 10, **BASE, checkpoint=checkpoint, window=window, scale=scale, **labels)


def record(rows: list[Any], examples: list[Any] | None = None) -> Record:
    return Record("evaluate", {"checkpoint": "base", "method": "yarn"}, rows, examples or [], {"cpu": "x"})


def ruler() -> Record:
    scores = {
        ("base", "niah_single_1"): (1.0, 0.5),
        ("base", "vt"): (0.2, 0.1),
        ("ours", "niah_single_1"): (1.0, 0.9),
        ("ours", "vt"): (0.3, 0.3),
    }
    rows = [
        row("string_match", value, window, checkpoint, task=task, protocol="ruler", seed=0)
        for (checkpoint, task), values in scores.items()
        for window, value in zip((4096, 16384), values, strict=True)
    ]
    return record(rows)


def test_ruler_marks_what_the_base_cannot_do_and_gives_both_means() -> None:
    found = ruler_tables(all_rows([ruler()]))
    assert len(found) == 1 and "vt" in found[0].note and f"{FAILED:g}" in found[0].note
    means = {name: [cell.text for cell in cells if cell] for name, cells in found[0].means.body}
    assert means == {
        "base · yarn, 2 kinds": ["0.60", "0.30"],
        "base · yarn, 1 unmarked": ["1.00", "0.50"],
        "ours · yarn, 2 kinds": ["0.65", "0.60"],
        "ours · yarn, 1 unmarked": ["1.00", "0.90"],
    }
    kinds = dict(found[0].kinds)
    assert [name for name, _ in kinds["ours · yarn"].body] == ["niah_single_1", "vt\u00a0†"]
    page = render_page([ruler()])
    assert "vt\u00a0†" in page and "1 unmarked" in page and 'id="others"' not in page


def test_intervals_of_kinds_and_of_their_mean() -> None:
    """Mean of 0.5 and 0.9 with ends 0.06 and 0.08 away each: half of the root of the summed squares, 0.05."""
    ends = {"vt": (0.5, 0.44, 0.56), "cwe": (0.9, 0.82, 0.98)}
    rows = [
        row("string_match", value, 4096, task=task, protocol="ruler", low=low, high=high)
        for task, (value, low, high) in ends.items()
    ]
    found = ruler_tables(all_rows([record(rows)]))[0]
    means = found.means.markdown()
    assert "| base · yarn, 2 kinds | 0.70 (0.65–0.75) |" in means and "| prompts a kind | 10 |" in means
    assert "| vt | 0.50 (0.44–0.56) |\n| cwe | 0.90 (0.82–0.98) |\n| prompts | 10 |" in found.kinds[0][1].markdown()
    del rows[0]["low"], rows[0]["high"]
    assert "| 0.70 |" in ruler_tables(all_rows([record(rows)]))[0].means.markdown()


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "text", "labels"),
    [
        ("loss", 2.5, 2.4, 2.61, "2.50 (2.40–2.61)", {"position": 4095, "protocol": "position"}),
        ("key_perplexity", 3.2, 3.0, 3.5, "3.20 (3.00–3.50)", {"protocol": "key_tokens", "key_model": "itself"}),
        ("whole_over_sliding", 1.02, 1.015, 1.03, "1.0200 (1.0150–1.0300)", {"protocol": "difference"}),
        ("retrieval", 0.5, 0.3, 0.7, "0.50 (0.30–0.70)", {"task": "needle", "choice": "chosen"}),
        ("attention_on_span", 0.05, 0.04, 0.061, "5.00% (4.00%–6.10%)", {"protocol": "attention"}),
        ("retrieval", 0.5, 0.3, 0.7, "0.50 (0.30–0.70)", {"task": "needle"}),
        ("perplexity", 5.0, 4.9, 5.1, "5.00 (4.90–5.10)", {"protocol": "whole"}),
    ],
)
def test_every_table_shows_intervals(
    metric: str, value: float, low: float, high: float, text: str, labels: dict[str, Any]
) -> None:
    unit = "share" if metric in ("retrieval", "attention_on_span") else "ratio"
    found = record([row(metric, value, 4096, unit=unit, low=low, high=high, **labels)])
    assert f" {text} |" in results_markdown([found])
    page = render_page([found])
    plain, ends = text.rstrip(")").split(" (")
    assert f'{plain} <span class="interval">{ends}</span>' in page
    assert " 10 |" in results_markdown([found]) or "n = 10" in results_markdown([found])


def test_without_a_native_window_nothing_is_marked() -> None:
    rows = [r for r in ruler().rows if r["window"] == 16384]
    found = ruler_tables(all_rows([record(rows)]))[0]
    assert "not known" in found.note and not any("†" in name for _, t in found.kinds for name, _ in t.body)


def test_loss_by_position() -> None:
    rows = [
        row("loss", 5 - np.log2(p + 1) / 4, window, checkpoint, "nats", protocol="position", position=p)
        for checkpoint in ("base", "ours")
        for window in (4096, 16384)
        for p in (1, 3, 15, 63, window - 1)
    ]
    section = position_sections(all_rows([record(rows)]))[0]
    table = position_table(section)
    assert table.head == ["up to position", "4", "16", "64", "16k"]
    assert [name for name, _ in table.body] == ["base · yarn, 16k at 4", "ours · yarn, 16k at 4"]
    drawing = position_figure(section)
    assert drawing is not None and "4.75 first" in drawing.description
    assert drawing.svg().count("<svg") == 1
    alone = position_sections(all_rows([record([r for r in rows if r["checkpoint"] == "base"])]))[0]
    assert len(position_table(alone).body) == 2  # one checkpoint alone shows every window
    page = render_page([record(rows)])
    assert 'id="context"' in page and 'id="training"' not in page and 'id="others"' not in page


def test_whole_over_sliding_and_key_tokens() -> None:
    rows = [
        row("whole_over_sliding", 1.0213, 4096, unit="ratio", protocol="difference"),
        row("key_perplexity", 3.21, 4096, unit="ratio", protocol="key_tokens", key_model="itself"),
        row("key_perplexity", 4.5, 4096, unit="ratio", protocol="key_tokens", key_model="big"),
    ]
    found = all_rows([record(rows)])
    assert "1.0213" in metric_tables(found, "whole_over_sliding")[0][1].markdown()
    text = metric_tables(found, "key_perplexity")[0][1].markdown()
    assert "| base · yarn | 3.21 |" in text and "| base · yarn, keys by big | 4.50 |" in text


def test_chosen_and_fixed_scales_stand_apart_from_the_other_results() -> None:
    rows = [
        row("perplexity", value, window, "ours", "ratio", protocol="whole", scale=scale, choice=which)
        for window, values in {4096: {1.0: 5.0, 2.0: 5.2, 4.0: 5.6}, 8192: {2.0: 4.5, 4.0: 4.8}}.items()
        for scale, value in values.items()
        for which in (("chosen",) if scale == 1.0 else ("chosen", "fixed") if window == 4096 * scale else ("fixed",))
    ]
    found = all_rows([record(rows)])
    assert sections(found, "perplexity") == []
    title, table = choice_tables(found)[0]
    assert "novels" in title
    assert table.markdown().splitlines()[2:] == [
        "| ours · yarn, chosen | **5.00** | **4.50** |",
        "| ours · yarn, fixed 2 | 5.20 | **4.50** |",
        "| ours · yarn, fixed 4 | 5.60 | 4.80 |",
        "| target tokens | 10 | 10 |",
    ]
    page = render_page([record(rows)])
    assert 'id="choice"' in page and 'id="perplexity"' not in page


def test_where_scales_make_no_difference_none_is_the_best() -> None:
    rows = [
        row("retrieval", value, window, "ours", task="pass_key", scale=scale, choice=choice)
        for window, values in ((4096, (0.0, 0.0)), (8192, (0.5, 0.2)))
        for scale, choice, value in ((1.0, "chosen", values[0]), (4.0, "fixed", values[1]))
    ]
    ((_, table),) = choice_tables(all_rows([record(rows)]))
    assert [[cell.best for cell in cells if cell] for _, cells in table.body] == [[False, True], [False, False]]


def test_what_fails_at_the_native_window_is_marked_beside_fixed_scales_too() -> None:
    """By its chosen scale: a fixed one that fails at a short window is what the table is to show."""
    rows = [
        row("retrieval", value, window, checkpoint, task="pass_key", scale=scale, choice=choice)
        for checkpoint, values in (("ours", (0.9, 0.1)), ("weak", (0.2, 0.1)))
        for window, scale, choice, value in ((4096, 1.0, "chosen", values[0]), (4096, 4.0, "fixed", values[1]))
    ]
    ((_, table),) = choice_tables(all_rows([record(rows)]))
    names = [name for name, _ in table.body]
    assert names[:2] == ["ours · yarn, chosen", "ours · yarn, fixed 4"]
    assert names[2:] == [f"weak · yarn, chosen{MARK}", f"weak · yarn, fixed 4{MARK}"]
    assert table.notes[-1].startswith("† fails inside its native window") and table.notes[-1].endswith(": weak · yarn.")
    perplexities = [one | {"metric": "perplexity", "unit": "ratio", "value": 1 + one["value"]} for one in rows]
    assert MARK not in choice_tables(all_rows([record(perplexities)]))[0][1].markdown()


def test_short_tasks_at_chosen_and_fixed_scales() -> None:
    def short(task: str, value: float, scale: float | None, which: str, method: str = "yarn", **more: Any) -> Any:
        labels = {"base_model": "tiny", "checkpoint": "ours", "method": method, "suite": "short", "choice": which}
        metric, unit = ("accuracy", "share") if task != "wiki" else ("word_perplexity", "score")
        own = {"task": task, "scale": scale, "harness_metric": "acc" if unit == "share" else metric, "filter": "none"}
        return make_row(metric, value, unit, 50, **(labels | own | more))

    rows = [
        short("piqa", 0.75, 1.0, "chosen", low=0.7, high=0.8),
        short("piqa", 0.7, 2.0, "fixed"),
        short("piqa", 0.6, 4.0, "fixed"),
        short("wiki", 12.5, None, "chosen"),
        short("wiki", 14.0, 2.0, "fixed"),
        short("piqa", 0.5, 1.0, "chosen", "linear"),
        short("piqa", 0.6, 2.0, "fixed", "linear"),
        short("nq", 0.3, 1.0, "chosen", filter="strict"),
        short("nq", 0.4, 1.0, "chosen", filter="loose"),
    ]
    ((title, table),) = choice_tables(all_rows([record(rows)]))
    assert title == "short tasks, tiny"
    assert table.markdown().splitlines() == [
        "| scale | piqa, acc | wiki, word_perplexity | nq, acc, strict | nq, acc, loose |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ours · yarn, chosen | **75.0** (70.0–80.0) | 12.5 score | 30.0 | 40.0 |",
        "| ours · yarn, fixed 2 | 70.0 | 14 score | – | – |",
        "| ours · yarn, fixed 4 | 60.0 | – | – | – |",
        "| ours · linear, chosen | 50.0 | – | – | – |",
        "| ours · linear, fixed 2 | **60.0** | – | – | – |",
        "| samples | 50 | 50 | 50 | 50 |",
    ]
    notes = [cell.note for cell in table.body[0][1] if cell]
    assert notes[0] == "scale 1, n = 50" and notes[1] == "own scales, n = 50"
    page = render_page([record(rows)])
    assert 'id="choice"' in page and 'id="tasks"' not in page and 'id="others"' not in page


def attention() -> Record:
    random = np.random.default_rng(0)
    rows = [
        row(metric, value, 8192, unit="heads" if metric == "retrieval_heads" else "share", protocol="attention", seed=0)
        for metric, value in {
            "attention_on_span": 0.051,
            "attention_on_others": 0.002,
            "attention_if_even": 0.004,
            "attention_of_best_head": 0.8,
            "retrieval_heads": 3,
        }.items()
    ]
    example = {
        "metric": "attention_map",
        "corpus": "novels",
        "window": 8192,
        "scale": 2.0,
        "prompts": 4,
        "on_span": random.random((3, 2)).tolist(),
        "head_score": [[0.0, 0.1], [0.9, 0.0], [0.0, 0.0]],
        "index": 1,
        "by_stretch": (random.dirichlet(np.ones(64), 3)).tolist(),
        "spans": [[0.4, 0.41], [0.1, 0.11], [0.8, 0.81]],
        "stretches": 64,
    }
    return record(rows, [example])


def test_attention_maps() -> None:
    title, table = attention_tables(all_rows([attention()]))[0]
    assert "base" in title
    assert [cell.text for cell in table.body[0][1] if cell] == ["5.10%", "0.20%", "0.40%", "80.00%", "3"]
    heading, drawing = attention_figures([attention()], ["x"])[0]
    assert "8k at scale 2" in heading and "head 0 of layer 1, 0.90" in drawing.description
    assert "stands 40% into it" in drawing.description
    svg = drawing.svg()
    assert len(re.findall(r"<path", svg)) > 50 and "var(--heat-" in svg
    assert all(title in svg for title in ("place in the prompt", "On it, by head", "Copied, by head"))
    page = render_page([attention()])
    assert page.count("<figure>") == 1 and 'id="others"' not in page
    # what the colours say stands in the text, for those who see the figure and not its description
    assert "attention on a log scale, from 0.01\u00a0% to all of it" in page and 10**FLOOR == 1e-4
    assert "log scale" not in render_page([record(attention().rows)])  # no map, no legend


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_each_heads_attention_on_the_value_is_drawn_in_its_place(width: int) -> None:
    """Colours of the second map, cell by cell, by the definition of its scale: 0.01 % is nothing, all is the last."""
    record = attention()
    shares = [[1.0, 0.0], [1e-2, 1e-5], [0.5, 1e-4]]
    record.examples[0]["on_span"] = shares
    (_, drawing) = attention_figures([record], ["x"])[0]
    assert "most by head 0 of layer 0, 1.00" in drawing.description
    assert "most by head 0 of layer 1, 0.90" in drawing.description
    axes = drawing.draw(LIGHT, width).axes
    assert len(axes) == 3
    drawn = {}
    for patch in axes[1].patches:
        for x in range(round(patch.get_x()), round(patch.get_x() + patch.get_width())):
            drawn[round(patch.get_y()), x] = LIGHT.heat.index(to_hex(patch.get_facecolor()))
    level = {1.0: 11, 0.5: 11, 1e-2: 6, 1e-4: 0, 1e-5: 0, 0.0: 0}
    assert drawn == {(y, x): level[value] for y, row in enumerate(shares) for x, value in enumerate(row)}
    boxes = [one.get_position() for one in axes]
    assert all(0 <= box.x0 and box.x1 <= 1 and 0 <= box.y0 and box.y1 <= 1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("made", [ruler, attention])
def test_markdown_holds_the_same_tables(made: Any) -> None:
    text = results_markdown([made()])
    assert ("## RULER: novels, tiny" in text) == (made is ruler)
    assert ("5.10%" in text) == (made is attention)
