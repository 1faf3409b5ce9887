"""Task tables: scores in percent with intervals, overall figures, the paper's rows beside; on page and in Markdown."""

from __future__ import annotations

import re
from typing import Any

import pytest

from e2llm.records import Record, make_row
from e2llm.report import render_page, results_markdown
from e2llm.report.quoted import LONGBENCH
from e2llm.report.series import all_rows
from e2llm.report.task_tables import task_sections

ENVIRONMENT = {"time": "2026-01-01T00:00:00+00:00", "python": "3.12.0", "cpu": "Example CPU"}


def task_row(task: str, value: float, metric: str = "f1", **labels: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"base_model": "tiny", "checkpoint": "paper", "method": "linear", "suite": "longbench",
                             "window": 16384, "scale": 2.0, "seed": 0, "native_window": 8192, "skipped": 0, "cut": 3,
                             "guessed": 0, "low": value - 0.05, "high": value + 0.05}  # fmt: skip
    n = labels.pop("n", 200)
    return make_row(metric, value, "share", n, **(about | {"task": task, "language": "en"} | labels))


def average_row(name: str, value: float, average: str = "plain", **labels: Any) -> dict[str, Any]:
    row = task_row("x", value, "average", tasks=name, average=average, **labels)
    return {key: found for key, found in row.items() if key not in ("task", "language")}


def record(*rows: dict[str, Any]) -> Record:
    return Record("evaluate", {}, list(rows), [], dict(ENVIRONMENT))


def longbench() -> Record:
    return record(
        task_row("hotpotqa", 0.4126),
        task_row("hotpotqa", 0.3, checkpoint="base", method="none", window=8192, scale=1.0, n=150),
        task_row("lcc", 0.5, "edit_similarity", skipped=7),
        average_row("en14", 0.4455, n=2800),
        average_row("all18", 0.4174, n=3600),
        average_row("all18", 0.43, "macro", n=3600),
        average_row("all21", 0.40, n=4200),
    )


def test_cells_hold_percent_intervals_and_counts() -> None:
    (section,) = task_sections(all_rows([longbench()]))
    tasks = section.tables[0]
    assert tasks.head == ["task", "paper · linear, 16k, scale 2", "base · none, 8k, scale 1"]
    (name, cells), (code, code_cells) = tasks.body
    assert name == "hotpotqa, f1, n = 150–200" and code == "lcc, edit_similarity, n = 200"
    assert [(cell.text, cell.interval) for cell in cells if cell] == [("41.3", "36.3–46.3"), ("30.0", "25.0–35.0")]
    assert [cell.best for cell in cells if cell] == [True, False]
    assert code_cells[1] is None and code_cells[0] is not None and "7 left out, 3 prompts cut" in code_cells[0].note


def test_the_papers_rows_stand_on_plain_means_only() -> None:
    (section,) = task_sections(all_rows([longbench()]))
    _, overall, macro = section.tables
    assert overall.head == ["plain means over tasks", "14 EN", "all 18", "all 21"]
    assert macro.head == ["macro-averages over groups of tasks", "all 18"]
    assert [(name, cells[0].text) for name, cells in macro.body if cells[0]] == [
        ("paper · linear, 16k, scale 2, n = 3,600", "43.0")
    ]
    names = [name for name, _ in overall.body]
    assert names[0] == "paper · linear, 16k, scale 2, n = 2,800–4,200" and all(
        name.startswith("quoted · ") for name in names[1:]
    )
    rows = {name: [cell.text if cell else None for cell in cells] for name, cells in overall.body}
    assert rows["quoted · E²-LLM-Llama2-13B-32k, Tables 1–2"] == ["44.55", "41.74", None]
    assert rows["quoted · 13B-32k without offset, Table 4"] == [None, "39.44", None]
    assert not any(cell.best for name, cells in overall.body if name.startswith("quoted") for cell in cells if cell)
    assert "“quoted”" in section.note and len(LONGBENCH) == len(names) - 1


def test_without_an_average_nothing_is_quoted() -> None:
    (section,) = task_sections(all_rows([record(task_row("hotpotqa", 0.4))]))
    assert len(section.tables) == 1 and "quoted" not in section.note


def test_two_files_with_the_same_labels_stay_apart(tmp_path: Any) -> None:
    values = {"a.json": 0.4, "b.json": 0.5}
    paths = [record(task_row("hotpotqa", value)).save(tmp_path / name) for name, value in values.items()]
    (section,) = task_sections(all_rows([Record.load(path) for path in paths]))
    assert section.tables[0].head[1:] == ["paper · linear, 16k, scale 2, a", "paper · linear, 16k, scale 2, b"]
    assert [cell.text[:4] for cell in section.tables[0].body[0][1] if cell] == ["40.0", "50.0"]


def test_columns_of_a_checkpoint_go_by_window_and_scale_whatever_the_order_of_the_files() -> None:
    places = [("plain", 32768, 8.0), ("paper", 8192, 2.0), ("plain", 8192, 4.0), ("plain", 8192, 2.0)]
    rows = [task_row("lcc", 0.5, checkpoint=c, window=w, scale=s) for c, w, s in places]
    (section,) = task_sections(all_rows([record(*rows)]))
    assert [head.replace(" · linear", "") for head in section.tables[0].head[1:]] == [
        "plain, 8k, scale 2", "plain, 8k, scale 4", "plain, 32k, scale 8", "paper, 8k, scale 2",
    ]  # fmt: skip
    assert "n\u00a0=\u00a0200</th>" in section.tables[0].html()  # stays on one line


def test_base_models_and_suites_stay_apart() -> None:
    one = task_row("hotpotqa", 0.4)
    rows = [one, task_row("hotpotqa", 0.4, base_model="other"), task_row("gsm100", 0.1, suite="leval")]
    titles = [section.title for section in task_sections(all_rows([record(*rows)]))]
    assert titles == ["LongBench, tiny", "LongBench, other", "L-Eval, closed tasks, tiny"]


def test_short_tasks_name_their_metric_and_quote_apart() -> None:
    own: dict[str, Any] = {"suite": "short", "window": None, "filter": "none", "method": "yarn"}
    rows = [task_row("hellaswag", v, "accuracy", **own, harness_metric=m) for m, v in (("acc", 0.3), ("acc_norm", 0.4))]
    perplexity = make_row("word_perplexity", 12.5, "score", 5, base_model="tiny", checkpoint="paper", method="yarn",
                          suite="short", task="wiki", scale=None, harness_metric="word_perplexity")  # fmt: skip
    (section,) = task_sections(all_rows([record(*rows, perplexity)]))
    tasks, quoted = section.tables
    assert [name for name, _ in tasks.body] == [
        "hellaswag, acc, n = 200", "hellaswag, acc_norm, n = 200", "wiki, word_perplexity, n = 5",
    ]  # fmt: skip
    assert tasks.head[1:] == ["paper · yarn, scale 2", "paper · yarn, own scales"]
    assert tasks.body[2][1][1] is not None and tasks.body[2][1][1].text == "12.5 score"
    (other,) = task_sections(all_rows([record(perplexity)]))
    assert len(other.tables) == 1 and "quoted" not in other.note
    assert quoted.head == ["model", "average of 8", "HellaSwag"] and quoted.body[0][0] == "quoted · Llama2-7B, Table 7"


def short_row(task: str, value: float, metric: str = "acc", **labels: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"suite": "short", "window": None, "filter": "none", "method": "yarn"}
    own |= {"harness_metric": metric, **labels}
    return task_row(task, value, "average" if task == "average" else "accuracy", **own)


def test_our_average_of_short_tasks_stands_beside_the_quoted_one() -> None:
    averages = [short_row("average", v, m, n=700, tasks="table7") for m, v in (("acc", 0.5), ("acc_norm", 0.52))]
    rows = [short_row("hellaswag", 0.4), *averages, short_row("average", 0.45, scale=8.0, n=700, tasks="table7")]
    (section,) = task_sections(all_rows([record(*rows)]))
    tasks, beside = section.tables
    names = [name for name, _ in tasks.body]
    assert names == ["hellaswag, acc, n = 200", "average of 7, acc, n = 700", "average of 7, acc_norm, n = 700"]
    assert beside.caption.endswith("average, ours and quoted from the paper")
    assert beside.head == ["model", "average of 7", "average of 8", "HellaSwag"]
    found = {name: [cell.text if cell else None for cell in cells] for name, cells in beside.body}
    assert found["paper · yarn, scale 2, acc, n = 700"] == ["50.0", None, None]
    assert found["paper · yarn, scale 2, acc_norm, n = 700"] == ["52.0", None, None]
    assert found["paper · yarn, scale 8, acc, n = 700"] == ["45.0", None, None]
    assert found["quoted · Llama2-7B, Table 7"] == [None, "53.7", "73.0"]
    cell = beside.body[0][1][0]
    assert cell is not None and cell.interval == "45.0–55.0"
    assert "without RACE-M" in section.note and "No average" not in section.note
    (other,) = task_sections(all_rows([record(*rows[:1], *[short_row(n, 0.5) for n in ("piqa", "wsc273", "race")])]))
    assert "No average of ours: without social_iqa, winogrande, nq_open." in other.note


def test_rows_of_chosen_and_fixed_scales_are_not_results() -> None:
    rows = [short_row("hellaswag", 0.4, choice="chosen", scale=1.0), short_row("hellaswag", 0.3, choice="fixed")]
    assert task_sections(all_rows([record(*rows)])) == []
    page = render_page([record(*rows)])
    assert 'id="choice"' in page and 'id="tasks"' not in page and 'id="others"' not in page


@pytest.mark.parametrize("render", [results_markdown, render_page])
def test_page_and_markdown_hold_the_tables_once(render: Any) -> None:
    text = render([longbench()])
    shown = "**41.3** (36.3–46.3)" if render is results_markdown else '41.3</strong> <span class="interval">36.3–46.3<'
    assert text.count(shown) == 1 and text.count("quoted · ") == len(LONGBENCH)
    assert "Other measurements" not in text
    if render is render_page:
        assert re.search(r'<section id="tasks"', text) and 'href="#tasks"' in text
