"""Sections of the page beyond perplexity and retrieval: RULER, use of context, choice of scale, attention.

Flows in: rows and Records. Flows out: `Part`s; one without rows is empty. The same tables go into Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.records import Record, source_names
from e2llm.report.attention import METRICS, attention_figures, attention_tables
from e2llm.report.choice import choice_tables
from e2llm.report.context import OTHERS, metric_tables, position_figure, position_sections, position_table
from e2llm.report.formats import join_words, sentence_case, slug
from e2llm.report.parts import Block, Heading, Part, drawn, figure_html, heading_html, quiet_html
from e2llm.report.ruler import ruler_tables
from e2llm.report.series import Row
from e2llm.report.tables import Table

FURTHER_METRICS = ("string_match", "key_perplexity", "key_share", "whole_over_sliding", *METRICS)
"""Metrics that a section below shows."""

_CHOICE = (
    "The scale that is chosen for a window, or a short request, against scales held fixed, by method; the best of a "
    "method in bold."
)
_RULER = (
    "RULER's kinds of questions: share of the expected strings that the answer holds, with 95 % "
    "intervals over prompts; higher is better."
)
_POSITION = "Loss of the tokens up to each position in whole windows: a curve that goes on falling uses its context."
_ATTENTION = (
    "Share of the generated answer's attention, mean over layers, heads and prompts, with 95 % intervals over prompts."
)

_MAPS = (
    "The maps: left, the answer's attention along the prompt, a row a layer; ▼ shows where the values stand, the large "
    "one where the asked one does. Then, by layer and head, attention on the asked value, and the share of it that the "
    "head copied. Darker is more: attention on a log scale, from 0.01 % to all of it; copies from none to all."
)


def _ruler(rows: Sequence[Row], records: Sequence[Record]) -> Part:
    body = ""
    for found in ruler_tables(rows):
        body += heading_html(sentence_case(found.title)) + found.means.html(kind="heat") + quiet_html(found.note)
        body += "".join(heading_html(label) + table.html(kind="heat") for label, table in found.kinds)
    return Part("ruler", "RULER", quiet_html(_RULER) + body if body else "")


def _context(rows: Sequence[Row], records: Sequence[Record]) -> Part:
    body = ""
    drawings = []
    for section in position_sections(rows):
        drawing = position_figure(section, name=slug("position", *section.labels.values()))
        title = sentence_case(join_words(section.title, section.base_model))
        body += heading_html(title) + position_table(section).html() + figure_html(drawing)
        drawings.append(drawing)
    body = quiet_html(_POSITION) + body if body else ""
    for metric, text in OTHERS.items():
        for title, table in metric_tables(rows, metric):
            body += heading_html(sentence_case(title)) + quiet_html(text) + table.html()
    return Part("context", "Is the context used?", body, drawn(drawings))


def _choice(rows: Sequence[Row], records: Sequence[Record]) -> Part:
    body = "".join(heading_html(sentence_case(title)) + table.html() for title, table in choice_tables(rows))
    return Part("choice", "Does choosing the scale matter?", quiet_html(_CHOICE) + body if body else "")


def _attention(rows: Sequence[Row], records: Sequence[Record]) -> Part:
    body = "".join(heading_html(sentence_case(title)) + table.html() for title, table in attention_tables(rows))
    drawings = attention_figures(records, source_names(records))
    body += quiet_html(_MAPS) if drawings else ""
    for title, drawing in drawings:
        body += heading_html(sentence_case(title)) + figure_html(drawing)
    body = quiet_html(_ATTENTION) + body if body else ""
    return Part("attention", "Where the answer looks", body, tuple(drawing for _, drawing in drawings))


FURTHER_PARTS = (_ruler, _context, _choice, _attention)


def further_blocks(rows: Sequence[Row]) -> list[Block]:
    """The same tables as blocks of a document."""
    blocks: list[Block] = []
    for found in ruler_tables(rows):
        blocks += [Heading(2, f"RULER: {found.title}"), _RULER, found.means, found.note, *_blocks(found.kinds)]
    positions = [(section.title, position_table(section)) for section in position_sections(rows)]
    tables: list[tuple[str, str, list[tuple[str, Table]]]] = [
        ("Loss by position", _POSITION, positions),
        *((metric, text, metric_tables(rows, metric)) for metric, text in OTHERS.items()),
        ("Does choosing the scale matter?", _CHOICE, choice_tables(rows)),
        ("Where the answer looks", _ATTENTION, attention_tables(rows)),
    ]
    for title, text, some in tables:
        blocks += [Heading(2, sentence_case(title.replace("_", " "))), text, *_blocks(some)] if some else []
    return blocks


def _blocks(tables: Sequence[tuple[str, Table]]) -> list[Block]:
    return [block for title, table in tables for block in (Heading(3, sentence_case(title)), table)]
