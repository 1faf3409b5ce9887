"""LaTeX tables: another program (pylatexenc) reads back what the Records say, whatever characters it is made of."""

from __future__ import annotations

import re
import string

import pytest
import sample_records
from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db

from e2llm.records import Record, make_row
from e2llm.report import results_latex, results_markdown
from e2llm.report.latex import escape, latex_table
from e2llm.report.tables import Cell, Table

AWKWARD = (
    string.punctuation,
    r"\foo{bar} $x_1^2$ & 50% #1 ~/.cache",
    "a--b ---c ,,d ?`e !`f ''g'' ``h``",
    "[1] starts an argument",
    "* starts a star form",
    r"\\",
    "E²-LLM · yarn × 4 – 5 † “quoted” … → ≤ ≥",
    "ZH 中文, naïve",
)


# What pylatexenc does not know; from LaTeX's own table of the T1 encoding (t1enc.def).
T1 = {"textless": "<", "textgreater": ">", "textbar": "|", "textquotedbl": '"', "textasciicircum": "^"}
KNOWN = get_default_latex_context_db()
KNOWN.add_context_category("t1", macros=[MacroTextSpec(k, v) for k, v in T1.items()], prepend=True)


def read_back(latex: str) -> str:
    return LatexNodes2Text(latex_context=KNOWN, strict_latex_spaces=True).latex_to_text(latex)


@pytest.mark.parametrize("text", AWKWARD)
def test_every_character_stands_for_itself(text: str) -> None:
    assert read_back(escape(text)) == text


def test_pairs_that_tex_would_join_are_kept_apart() -> None:
    """Ligatures of T1 fonts, which a reader of markup alone does not know."""
    found = escape("a--b---c ,, ?` !` ''")
    assert not re.search(r"--|,,|[?!]`|''", found)


def test_a_row_begins_with_nothing_that_a_line_break_would_take() -> None:
    table = Table("t", ["head", "1"], [("[x]", [Cell("[1]")]), ("*", [Cell("2")])])
    rows = latex_table(table, caption="c", label="l").splitlines()
    assert not any(row.startswith(("[", "*")) for row in rows)


def test_table_by_hand() -> None:
    body = [("base · none", [Cell("82.4", best=True, interval="80.1–84.0"), None]), ("a_b", [Cell("83"), Cell("9 %")])]
    table = Table("x", ["checkpoint", "512", "8k"], body, foot=("target tokens", ["100", "1,200"]))
    assert latex_table(table, caption="Perplexity, 100 %", label="perplexity") == "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            r"\caption{Perplexity, 100 \%}",
            r"\label{tab:perplexity}",
            r"\begin{tabular}{lrr}",
            r"\toprule",
            r"checkpoint & 512 & 8k \\",
            r"\midrule",
            r"base · none & \textbf{82.4} {\scriptsize (80.1–84.0)} & – \\",
            r"a\_b & 83 & 9 \% \\",
            r"\midrule",
            r"target tokens & 100 & 1,200 \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def cells_of(latex: str) -> list[list[str]]:
    """Text of each row of each tabular, read by pylatexenc."""
    rows = []
    for inner in re.findall(r"\\begin\{tabular\}\{l?r*\}(.*?)\\end\{tabular\}", latex, re.DOTALL):
        for row in inner.split(r" \\"):
            cells = re.split(r"(?<!\\)&", re.sub(r"\\(top|mid|bottom)rule", "", row))
            rows.append([read_back(cell).strip() for cell in cells])
    return [row for row in rows if row != [""]]


def test_the_same_cells_as_in_markdown() -> None:
    records = [sample_records.study(), sample_records.study("novels"), sample_records.quickstart()]
    wanted = []
    for line in results_markdown(records).splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            wanted.append([cell.replace("**", "") for cell in line.strip("| ").split(" | ")])
    assert cells_of(results_latex(records)) == wanted and len(wanted) > 30


def test_names_labels_and_comments() -> None:
    row = make_row("perplexity", 2.0, "ratio", 1, checkpoint="100%_#1", method="yarn", window=512, corpus="a_b")
    record = Record("evaluate", {}, [row], [], {"cpu": "CPU_X & 100%"})
    text = results_latex([record, Record("evaluate", {}, [row | {"corpus": "A B"}], [], {})])
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(labels) == len(set(labels)) == 2 and all(re.fullmatch(r"tab:[a-z0-9-]+", one) for one in labels)
    assert r"100\%\_\#1 · yarn" in text and r"CPU\_X \& 100\%" in text
    assert text.startswith("% Made by e2llm report --latex") and "booktabs" in text.splitlines()[1]
    assert text.count("{") == text.count("}")
