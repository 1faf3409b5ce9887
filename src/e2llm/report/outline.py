"""What a document of tables holds, in order: headings, sentences, tables. The same for Markdown and LaTeX.

Flows in: Records. Flows out: blocks. Text may hold `code`; a renderer escapes what comes from Records in tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.records import Record, source_names
from e2llm.report.cost import cost_tables
from e2llm.report.formats import METRIC_NAMES, join_words, sentence_case
from e2llm.report.further import further_blocks
from e2llm.report.parts import Block, Heading
from e2llm.report.quoted_tables import quoted_perplexity, quoted_unseen_scales
from e2llm.report.series import Row, Section, all_rows, sections, series_of
from e2llm.report.tables import scale_table, window_table
from e2llm.report.task_tables import task_sections

_NOTES = {
    "perplexity": "Lower is better. Each value at the scale that its window is served at: the calibrated one, or the "
    "smallest that covers it.",
    "retrieval": "Share of prompts answered, over all depths; higher is better.",
}
_BRACKETS = "In brackets: the 95 % interval over documents (where several were read) or prompts."


def outline(records: Sequence[Record]) -> list[Block]:
    """One table a corpus and protocol or task, a window × scale table where scales were compared, and where it ran.

    ValueError for no Record.
    """
    if not records:
        raise ValueError("records = []: give at least one Record")
    rows = all_rows(records)
    blocks: list[Block] = []
    for metric, note in _NOTES.items():
        found = sections(rows, metric)
        bracketed = any(row.get("low") is not None for section in found for row in section.rows)
        if found:
            blocks += [Heading(2, METRIC_NAMES[metric]), f"{note} {_BRACKETS}" if bracketed else note]
        for section in found:
            blocks += [Heading(3, _title(section)), window_table(section)]
            for series in series_of(section) if metric == "perplexity" else ():
                table = scale_table(section, series)
                if table is not None:
                    blocks += [Heading(4, f"Window by scale: {series.label}"), table]
        if found and metric == "perplexity":
            blocks += _quoted(rows, records)
    blocks += further_blocks(rows)
    for task_section in task_sections(rows, records):
        blocks += [Heading(2, task_section.title), task_section.note, *task_section.tables]
    costs = cost_tables(rows, records)
    blocks += [Heading(2, "Cost")] if costs else []
    for cost in costs:
        blocks += [Heading(3, cost.title), cost.table]
    return [*blocks, Heading(2, "Where it ran"), _environments(records)]


def file_names(records: Sequence[Record]) -> list[str]:
    """Names of the files that the Records were loaded from, as short as they can be told apart."""
    names = zip(source_names(records), records, strict=True)
    return [f"{name}{record.path.suffix if record.path else ''}" for name, record in names]


def _quoted(rows: Sequence[Row], records: Sequence[Record]) -> list[Block]:
    """What the paper prints of perplexity."""
    table, sentence = quoted_perplexity(rows), quoted_unseen_scales(rows, records)
    blocks: list[Block] = [] if table is None else [Heading(3, "Beside the paper"), table]
    return [*blocks, sentence] if sentence else blocks


def _title(section: Section) -> str:
    title = join_words(section.title, section.base_model) or "all rows"
    return sentence_case(title)


def _environments(records: Sequence[Record]) -> str:
    lines: dict[str, list[str]] = {}
    for name, record in zip(source_names(records), records, strict=True):
        env = record.environment
        device = f"{env.get('gpus', 1)} × {env['gpu']}" if env.get("gpu") else str(env.get("cpu") or "")
        versions = [f"{package} {env[package]}" for package in ("torch", "transformers") if env.get(package)]
        lines.setdefault(join_words(device, *versions) or "not recorded", []).append(f"`{name}`")
    return "\n".join(f"- {where}: {', '.join(names)}" for where, names in lines.items())
