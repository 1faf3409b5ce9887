r"""The tables of a document in LaTeX: booktabs tables for a paper, made from the same Records.

Flows in: Records. Flows out: LaTeX text to \input; the document needs \usepackage[T1]{fontenc} and
\usepackage{booktabs} (LaTeX of 2020 or later). Every character of a Record prints as itself. Knows no metric; what
stands in a cell is `tables`' choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from e2llm.records import Record
from e2llm.report.formats import slug
from e2llm.report.outline import file_names, outline
from e2llm.report.parts import Block, Heading
from e2llm.report.tables import Cell, Table

_CHARACTERS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    # These begin an optional argument or a star form where a row of a table begins.
    "[": "{[}", "]": "{]}", "*": "{*}",
    # Signs that text fonts lack.
    "→": r"\(\rightarrow\)", "≤": r"\(\leq\)", "≥": r"\(\geq\)",
}  # fmt: skip
"""Character -> LaTeX; the rest of Unicode stays, as LaTeX reads UTF-8 and has signs such as – · × † ² in its fonts."""
_LIGATURES = re.compile(r"-(?=-)|,(?=,)|[!?](?=\x60)")
"""First of two characters that TeX would join into another one."""
_NEEDS = "% Needs: \\usepackage[T1]{fontenc} \\usepackage{booktabs}"
_LEVELS = {2: "section", 3: "subsection", 4: "subsubsection"}


def results_latex(records: Sequence[Record]) -> str:
    """LaTeX with the tables of `results_markdown`, each a `table` with caption and label; headings are sections."""
    blocks = outline(records)
    files = " ".join(", ".join(file_names(records)).split())  # a comment ends with its line
    head = f"% Made by e2llm report --latex from {files}; do not edit.\n{_NEEDS}"
    taken: dict[str, int] = {}
    body = []
    above: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            above = [*above[: block.level - 2], block.text]
        body.append(_block(block, above, taken))
    return "\n\n".join([head, *body]) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX that prints it character by character, on one line."""
    text = _LIGATURES.sub(lambda match: match[0] + "\x00", " ".join(text.split()))
    return "".join("{}" if c == "\x00" else _CHARACTERS.get(c, c) for c in text)


def latex_table(table: Table, *, caption: str, label: str) -> str:
    """One `table` float; the best of a column in bold, an interval smaller and in brackets."""
    columns = "l" + "r" * (len(table.head) - 1)
    lines = [_row([escape(text) for text in table.head])]
    rule = [r"\midrule"]
    body = [_row([escape(name), *map(_cell, cells)]) for name, cells in table.body]
    foot = [] if table.foot is None else [r"\midrule", _row([escape(table.foot[0]), *map(escape, table.foot[1])])]
    notes = "".join(f"\n\\par\\smallskip{{\\footnotesize {escape(note)}\\par}}" for note in table.notes)
    inner = "\n".join([r"\toprule", *lines, *rule, *body, *foot, r"\bottomrule"])
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{escape(caption)}}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n{inner}\n\\end{{tabular}}{notes}\n\\end{{table}}"
    )


def _block(block: Block, above: Sequence[str], taken: dict[str, int]) -> str:
    if isinstance(block, Heading):
        return f"\\{_LEVELS[block.level]}*{{{escape(block.text)}}}"
    if isinstance(block, Table):
        caption = block.caption if block.caption.startswith(above[-1]) else ": ".join(above)
        name = slug(caption)
        taken[name] = taken.get(name, 0) + 1
        label = name if taken[name] == 1 else f"{name}-{taken[name]}"
        return latex_table(block, caption=caption, label=label)
    return "\\\\\n".join(_sentences(line) for line in block.split("\n"))


def _sentences(line: str) -> str:
    """A line of text; `code` becomes typewriter."""
    pieces = re.split(r"`([^`]*)`", line)
    return "".join(rf"\texttt{{{escape(p)}}}" if index % 2 else _spaced(p) for index, p in enumerate(pieces))


def _spaced(text: str) -> str:
    """Escaped, with the spaces at its ends that stood there."""
    start, end = text[:1].isspace(), text[-1:].isspace() and len(text) > 1
    return " " * start + escape(text) + " " * end


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = rf"\textbf{{{escape(cell.text)}}}" if cell.best else escape(cell.text)
    text += rf"\textsuperscript{{{escape(cell.mark)}}}" if cell.mark else ""
    return rf"{text} {{\scriptsize ({escape(cell.interval)})}}" if cell.interval else text
