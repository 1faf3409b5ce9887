"""One self-contained HTML page from Records: no script, no request, readable in light, dark, print and by ear.

Flows in: Records or their files. Flows out: HTML text or a file. Everything that comes from a Record is escaped.
A section without rows is left out.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from e2llm.records import LABELS, Record, labels_of, source_names, write_atomic
from e2llm.report.cost import cost_tables, is_cost_row
from e2llm.report.depths import depth_maps, depth_table
from e2llm.report.figures import (
    perplexity_figure,
    rescaled_figure,
    retrieval_figure,
    scale_figure,
    training_figure,
)
from e2llm.report.formats import format_count, format_number, format_quantity, join_words, sentence_case, slug
from e2llm.report.further import FURTHER_METRICS, FURTHER_PARTS
from e2llm.report.headline import Headline, headline
from e2llm.report.parts import Part, drawn, figure_html, heading_html, quiet_html
from e2llm.report.quoted_tables import quoted_perplexity, quoted_unseen_scales
from e2llm.report.rescaled import rescaled
from e2llm.report.series import Row, Section, all_rows, sections, series_of
from e2llm.report.stylesheet import stylesheet
from e2llm.report.tables import breakable, interval_text, scale_table, window_table
from e2llm.report.task_tables import task_sections

_MOST_OTHERS = 400  # rows of metrics without a figure; more are counted, not listed


def write_report(record_paths: Sequence[str | os.PathLike[str]], out_path: str | os.PathLike[str]) -> Path:
    """Load the Records and write the page in one step. ValueError for no path or a file that is no Record."""
    if not record_paths:
        raise ValueError("record_paths = []: name at least one Record file")
    return write_atomic(Path(out_path), render_page([Record.load(path) for path in record_paths]))


def render_page(records: Sequence[Record]) -> str:
    """The page as text."""
    rows = all_rows(records)
    top = headline(rows, len(records))
    parts = _measured(rows, records)
    parts += [_what_was_run(records), _files(records)]
    links = "".join(f'<li><a href="#{part.anchor}">{html.escape(part.title)}</a></li>' for part in parts)
    body = "\n".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-title">'
        f'<h2 id="{part.anchor}-title">{html.escape(part.title)}</h2>\n{part.body}</section>'
        for part in parts
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(top.sentence)} · e2llm report</title>\n<style>\n{stylesheet()}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the results</a>\n{_header(top, rows)}\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">\n{body}\n</main>\n'
        f"<footer><p>Made by <code>e2llm report</code> from {_count(len(records), 'Record')}, "
        f"{_count(len(rows), 'row')}. Nothing on this page is loaded from elsewhere.</p></footer>\n</body>\n</html>\n"
    )


def save_figures(records: Sequence[Record], folder: str | os.PathLike[str], *, dark: bool = False) -> list[Path]:
    """Every figure of the page as FOLDER/NAME.svg and FOLDER/NAME.png, in light or dark; the files.

    ValueError where the Records give nothing to draw.
    """
    drawings = [drawing for part in _measured(all_rows(records), records) for drawing in part.drawings]
    if not drawings:
        raise ValueError("figures: these Records hold nothing to draw (one window, or no curve and no map)")
    return [
        drawing.save(Path(folder) / f"{drawing.name}{suffix}", dark=dark)
        for drawing in drawings
        for suffix in (".svg", ".png")
    ]


def _measured(rows: Sequence[Row], records: Sequence[Record]) -> list[Part]:
    """The sections that have something to show."""
    builders = (_rescaled, _perplexity, _scales, _retrieval, *FURTHER_PARTS, _tasks, _training, _cost, _others)
    return [part for build in builders for part in [build(rows, records)] if part.body]


def _header(top: Headline, rows: Sequence[Row]) -> str:
    models = sorted({str(row["base_model"]) for row in rows if row.get("base_model")})
    tiles = "".join(f"<div><dt>{html.escape(what)}</dt><dd>{_arrows(value)}</dd></div>" for value, what in top.tiles)
    eyebrow = html.escape(" · ".join(["e2llm report", *models[:3]]))
    return (
        f'<header><p class="eyebrow">{eyebrow}</p>\n<h1>{_arrows(top.sentence)}</h1>\n'
        + (f'<p class="lede">{_arrows(top.detail)}</p>\n' if top.detail else "")
        + (f'<dl class="tiles">{tiles}</dl>\n' if tiles else "")
        + "</header>"
    )


def _rescaled(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    found = rescaled(rows)
    if found is None:
        return Part("rescaled", "", "")
    drawing = rescaled_figure(found)
    text = (
        '<p class="quiet">The same weights throughout. Bold: each window at the scale that serves it; thin: every '
        "window at one scale. Lower is better; a line that leaves the chart says how far.</p>"
    )
    heading = join_words(found.label, found.section.title, found.section.base_model)
    body = text + f"<h3>{html.escape(sentence_case(heading))}</h3>" + figure_html(drawing)
    return Part("rescaled", "One set of weights, re-scaled for each window", body, (drawing,))


def _perplexity(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    blocks = []
    drawings = []
    for section in sections(rows, "perplexity"):
        drawings.append(drawing := perplexity_figure(section, name=slug("perplexity", *section.labels.values())))
        blocks.append(_heading(section) + window_table(section).html() + figure_html(drawing))
    quoted = quoted_perplexity(rows)
    if blocks and quoted is not None:
        blocks.append("<h3>Beside the paper</h3>" + quoted.html())
    if blocks:
        blocks.append(quiet_html(quoted_unseen_scales(rows, records)))
    text = (
        '<p class="quiet">Summed nats over summed target tokens, to the power of e; lower is better. Each value is '
        "measured at the scale that a request of that length is served with: the calibrated one, else the smallest of "
        "those evaluated that covers its window. Best of a column in bold; below a value its 95&nbsp;% interval over "
        "documents, where several were read.</p>"
    )
    return Part("perplexity", "Perplexity by window", text + "".join(blocks) if blocks else "", drawn(drawings))


def _scales(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    blocks = []
    drawings = []
    first = rescaled(rows)  # its lines stand at the top of the page already
    for section in sections(rows, "perplexity"):
        for series in series_of(section):
            table = scale_table(section, series)
            if table is not None:
                name = slug("scales", *section.labels.values(), *series.key.values())
                heading = f"<h3>{html.escape(join_words(series.label, section.title))}</h3>"
                is_first = first is not None and (first.section.labels, first.served) == (section.labels, series.points)
                drawing = None if is_first else scale_figure(section, series, name=name)
                drawings.append(drawing)
                blocks.append(heading + table.html(kind="heat") + figure_html(drawing))
    text = (
        '<p class="quiet">The same weights at every scale. Shading <span class="key cost"></span> shows what a '
        "scale costs over the best one for its window, full at twice the perplexity; "
        '<span class="key served"></span> marks the scale that is served.</p>'
    )
    return Part("scales", "Window by scale", text + "".join(blocks) if blocks else "", drawn(drawings))


def _retrieval(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    blocks = []
    drawings = []
    for section in sections(rows, "retrieval"):
        drawings.append(drawing := retrieval_figure(section, name=slug("retrieval", *section.labels.values())))
        blocks.append(_heading(section) + window_table(section).html() + figure_html(drawing) + _by_depth(section))
    text = (
        '<p class="quiet">Share of prompts whose answer was found, over all depths; higher is better. '
        "Below a value its 95&nbsp;% interval over prompts.</p>"
    )
    return Part("retrieval", "Retrieval", text + "".join(blocks) if blocks else "", drawn(drawings))


def _by_depth(section: Section) -> str:
    """What a map shows by colour, as tables to open."""
    maps = depth_maps(section)
    tables = "".join(f"<h4>{html.escape(one.label)}</h4>" + depth_table(section, one).html() for one in maps)
    return f"<details><summary>Every depth, with intervals</summary>{tables}</details>" if maps else ""


def _tasks(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    blocks = [
        f'<h3>{html.escape(section.title)}</h3>' + quiet_html(section.note)
        + "".join(table.html() for table in section.tables)
        for section in task_sections(rows, records)
    ]
    return Part("tasks", "Tasks", "".join(blocks))


def _training(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["metric"] == "loss" and row.get("step") is not None:
            runs.setdefault((str(row.get("checkpoint") or ""), row["source"]), []).append(row)
    blocks = []
    drawings = []
    for (checkpoint, source), group in runs.items():
        drawings.append(drawing := training_figure(group, name=slug("training", checkpoint, source)))
        if drawing is not None:
            blocks.append(f"<h3>{html.escape(checkpoint or source)}</h3>" + figure_html(drawing))
    text = (
        '<p class="quiet">Training loss is at the scales that training draws; '
        "held-out loss has one line for each fixed scale.</p>"
    )
    return Part("training", "Training", text + "".join(blocks) if blocks else "", drawn(drawings))


def _cost(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    found = cost_tables(rows, records)
    return Part("cost", "Cost", "".join(heading_html(one.title) + one.table.html() for one in found))


def _others(rows: Sequence[Row], records: Sequence[Record] = ()) -> Part:
    """Rows that no section above shows, as they are."""
    others = [row for row in rows if not _is_shown(row)]
    lines = []
    for row in others[:_MOST_OTHERS]:
        labels = labels_of(row)
        known = [name for name in LABELS if name in labels]
        names = known + [name for name in labels if name not in LABELS and name != "source"]
        text = join_words(*(f"{name} {labels[name]}" for name in names if labels[name] is not None))
        is_bytes = row["unit"] == "bytes"  # other units stand behind the value already
        ends = interval_text(row, functools.partial(format_quantity, unit="bytes") if is_bytes else format_number)
        cells = (text, format_quantity(row["value"], row["unit"]), ends or "–", format_count(row["n"]))
        lines.append([row["metric"], *cells])
    if not lines:
        return Part("others", "", "")
    rest = len(others) - len(lines)
    more = f'<p class="quiet">{_count(rest, "more row")} in the files.</p>' if rest else ""
    head = ["metric", "labels", "value", f"95{chr(160)}% interval", "n"]
    return Part("others", "Other measurements", _text_table("Other rows", head, lines, 2) + more)


def _is_shown(row: Row) -> bool:
    if row["metric"] == "loss":
        return row.get("step") is not None or row.get("position") is not None
    known = row["metric"] in ("perplexity", "retrieval", *FURTHER_METRICS) and row.get("window") is not None
    return known or row.get("suite") is not None or is_cost_row(row)


def _what_was_run(records: Sequence[Record]) -> Part:
    blocks = []
    for name, record in zip(source_names(records), records, strict=True):
        env = record.environment
        device = f"{env.get('gpus', 1)} × {env['gpu']}" if env.get("gpu") else str(env.get("cpu") or "")
        versions = [f"{package} {env[package]}" for package in ("e2llm", "torch", "transformers") if env.get(package)]
        line = join_words(f"{record.kind}, {_count(len(record.rows), 'row')}", device, *versions)
        inner = "<h3>Configuration</h3>" + _facts(record.config) + "<h3>Environment</h3>" + _facts(env)
        blocks.append(
            f"<details><summary>{html.escape(name)}</summary>{inner}</details>".replace(
                "</summary>", f' <span class="quiet">{html.escape(line)}</span></summary>', 1
            )
        )
    text = '<p class="quiet">Configuration and environment of each Record; those that are open are printed.</p>'
    return Part("run", "What was run", text + "".join(blocks) if blocks else "")


def _files(records: Sequence[Record]) -> Part:
    lines = []
    for name, record in zip(source_names(records), records, strict=True):
        file = f"{name}{record.path.suffix}" if record.path else f"{name} (not saved)"
        digest = hashlib.sha256(record.path.read_bytes()).hexdigest()[:16] if record.path else ""
        counts = (format_count(len(record.rows)), format_count(len(record.examples)))
        lines.append([file, record.kind, digest, *counts])
    table = _text_table("Record files", ["file", "kind", "SHA-256 begins", "rows", "examples"], lines, 3, whole=True)
    return Part("files", "Files", table)


def _heading(section: Section) -> str:
    title = join_words(section.title, section.base_model)
    return f"<h3>{html.escape(sentence_case(title))}</h3>" if title else ""


def _text_table(
    caption: str, head: Sequence[str], lines: Sequence[Sequence[str]], numbers_from: int, *, whole: bool = False
) -> str:
    """A plain table; columns from `numbers_from` on are numbers. `whole`: no line of the others ends inside a word."""

    def cells(line: Sequence[str]) -> Iterator[str]:
        yield f'<th scope="row">{breakable(line[0]) if whole else html.escape(line[0])}</th>'
        for kind, text in zip(kinds[1:], line[1:], strict=True):
            yield f"<td{kind}>{html.escape(text)}</td>"

    text_kind = ' class="whole"' if whole else ""
    kinds = ["", *(' class="number"' if index >= numbers_from else text_kind for index in range(1, len(head)))]
    heads = "".join(f'<th scope="col"{kind}>{html.escape(text)}</th>' for kind, text in zip(kinds, head, strict=True))
    body = "".join(f"<tr>{''.join(cells(line))}</tr>" for line in lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table class="text">'
        f'<caption class="sr">{html.escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _facts(values: dict[str, Any]) -> str:
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _flat(values))
    return f'<dl class="facts">{facts}</dl>' if facts else '<p class="quiet">Nothing recorded.</p>'


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """{"train": {"steps": 5}} -> ("train.steps", "5"); lists stay JSON."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{before}{name}", text or "–"


def _arrows(text: str) -> str:
    """Escaped text; arrows are drawn quietly and read aloud as "to"."""
    arrow = ' <span class="sr">to</span><span class="arrow" aria-hidden="true">→</span> '
    return html.escape(text).replace(" → ", arrow)


def _count(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"
