"""Pages and figures made from Records: docs/results.md, the tables of the README, docs/images.

Flows in: benchmarks/results/*.json. Flows out: Markdown and SVG. Every figure in them comes from a Record; what is said
about them (which claim holds) is computed, so that new Records change the sentence too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from docs_evaluation import evaluation_records
from docs_reading import answer_blocks, reading_blocks
from docs_serving import serving_blocks

from e2llm.config import load_recipe
from e2llm.evaluate.scale_rule import best_scale
from e2llm.records import Record
from e2llm.report import perplexity_figure, results_markdown, write_coverage
from e2llm.report.formats import format_value, format_window, slug
from e2llm.report.series import Row, Section, all_rows, sections, series_of
from e2llm.report.shared_documents import mark_of
from e2llm.report.tables import window_table

STUDY = "smollm2_"
QUICKSTART = "quickstart"
COVERED = ("paper", "recommended", "recommended-yarn")
"""Recipes whose coverage is drawn."""
OURS = ("recommended", "recommended-yarn")
"""Checkpoints that claims are about."""
COVERAGE_WINDOW = 8192
"""Native window of the coverage pictures, tokens: SmolLM2's."""


def load(folder: Path) -> list[Record]:
    """The Records of a folder, by name."""
    return [Record.load(path) for path in sorted(folder.glob("*.json"))]


def named(records: Sequence[Record], prefix: str) -> list[Record]:
    """Those whose file name starts with `prefix`."""
    return [record for record in records if record.path is not None and record.path.name.startswith(prefix)]


def measured(records: Sequence[Record]) -> list[Record]:
    """Those that results are reported on: neither runs of the study (docs/study.md), evaluations of all suites
    (docs/evaluation.md), calibrations, training speed (docs/training-speed.md), the speed of answers nor how near
    llama.cpp comes to groups (docs/decisions.md)."""
    elsewhere = ("study", "study_final", "calibrate", "benchmark_train", "train_losses", "train_resume", "answer_speed")
    elsewhere = (*elsewhere, "llamacpp_frames")
    apart = {id(record) for record in evaluation_records(records)}
    return [record for record in records if record.kind not in elsewhere and id(record) not in apart]


def results_page(found: Sequence[Record]) -> str:
    """docs/results.md: figures, tables, and what the tables say."""
    records = measured(found)
    head, tables = results_markdown(records).split("\n\n## ", 1)
    head = head.replace("`e2llm report --markdown`", "`python scripts/docs.py`")
    images = "\n\n".join(f"![{title}](images/{file})" for file, title, _ in _figures(records))
    finals = [record for record in found if record.kind == "study_final"]
    checked = f"## What the study set out to show\n\n{claims(finals)}"
    notes = [*first_runs_note(records, finals), *wording_note(records)]
    blocks = [head, *notes, checked, f"## {tables.rstrip()}", "## Figures", images]
    blocks += calibration_block([record for record in found if record.kind == "calibrate"])
    blocks += [*serving_blocks(records), *reading_blocks(records), *answer_blocks(found)]
    return "\n\n".join(blocks) + "\n"


def first_runs_note(records: Sequence[Record], finals: Sequence[Record]) -> list[str]:
    """Which of two tables of a checkpoint counts, where the first runs and the final comparison are both there."""
    if not (named(records, STUDY) and finals):
        return []
    return [
        f"Tables of SmolLM2 on this page are of the first, short runs (`{STUDY}…`). What is claimed rests on the "
        "[final comparison](study.md#final-comparison), which has a larger budget and more documents, and on "
        "[all suites of the evaluation](evaluation.md); a checkpoint of the same name has other figures there."
    ]


def calibration_block(records: Sequence[Record]) -> list[str]:
    """The scale that read each window best, one row a checkpoint; documents that no result is reported on. Records that
    do not say what was chosen are judged by today's rule."""
    if not records:
        return []
    best = {r.config["checkpoint"]: _scales_of(r) for r in records}
    windows = sorted({window for scales in best.values() for window in scales})
    lines = [("checkpoint", *map(format_window, windows)), ("---", *["---:"] * len(windows))]
    lines += [(name, *(f"{scales[w]:g}" if w in scales else "–" for w in windows)) for name, scales in best.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    names = sorted({d["name"] for r in records for c in r.config["corpora"].values() for d in c["documents"]})
    documents = ", ".join(f"`{name}`" for name in names)
    note = f"The scale that reads each window best, on {documents}, which no table holds."
    return ["## Calibration", note, table]


def _scales_of(record: Record) -> dict[int, float]:
    """Window -> scale, of the windows that a calibration measured."""
    windows, native = record.config["windows"], record.config["native_window"]
    chosen = {step["window"]: step["scale"] for step in record.config.get("chosen", [])}
    return {w: chosen[w] if w in chosen else best_scale(record.rows, w, native) for w in windows}


def quickstart_block(records: Sequence[Record]) -> str:
    """The README's tables of one quickstart; nothing before its Record is there."""
    found = all_rows(named(records, QUICKSTART))
    parts = []
    for metric, title in (("perplexity", "Perplexity"), ("retrieval", "Pass keys found")):
        for section in sections(found, metric):
            parts += [f"{title}, {section.labels['corpus']}:", window_table(section).markdown().rstrip()]
    return "\n\n".join(parts)


def wording_note(records: Sequence[Record]) -> list[str]:
    """A warning where pass keys were asked before the wording was written into Records."""
    old = [
        f"`{record.path.name}`"
        for record in records
        if record.path and not record.config.get("prompt") and record.kind == "evaluate"
        if any(row["metric"] == "retrieval" for row in record.rows)
    ]
    if not old:
        return []
    return [
        f"Pass keys in {', '.join(old)} were asked with an earlier wording of the announcement before the text, and "
        "the Record does not hold it. They will be measured again; compare them with each other only."
    ]


def claims(records: Sequence[Record]) -> str:
    """What the study was to show, with the figures and whether it holds."""
    rows = [("corpus", "claim", "figures", "holds"), ("---",) * 4]
    for section in sections(all_rows(records), "perplexity"):
        if section.labels["protocol"] == "whole":
            rows += [(str(section.labels["corpus"]), *claim) for claim in _claims(section)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _claims(section: Section) -> Iterator[tuple[str, str, str]]:
    """One claim a line, for each of ours that is there; of several seeds all have to say the same."""
    points: dict[str, list[Mapping[int, Row]]] = defaultdict(list)
    for one in series_of(section):
        if not one.is_base:
            points[one.checkpoint].append(one.points)
    paper = points.get("paper", [{}])[0]
    for name in OURS:
        ours = points.get(name, [])
        for window in (8192, 32_768, 131_072):
            pairs = [(one[window], paper[window]) for one in ours if window in one and window in paper]
            yield from _claim(f"`{name}` below `paper` at {format_window(window)}", pairs)
        pairs = [(one[131_072], one[8192]) for one in ours if {8192, 131_072} <= one.keys()]
        yield from _claim(f"`{name}` at 128k below its own 8k", pairs)


def _claim(text: str, pairs: Sequence[tuple[Row, Row]]) -> Iterator[tuple[str, str, str]]:
    if not pairs:
        return
    figures = ", ".join(
        f"{format_value('perplexity', lower['value'])} against {format_value('perplexity', higher['value'])}"
        for lower, higher in pairs
    )
    if any(mark_of(lower) != mark_of(higher) or lower["n"] != higher["n"] for lower, higher in pairs):
        yield text, figures, "not measured on the same text"
    else:
        yield text, figures, "yes" if all(lower["value"] < higher["value"] for lower, higher in pairs) else "**no**"


def _figures(records: Sequence[Record]) -> Iterator[tuple[str, str, Section | str]]:
    """(file, title, what is drawn) of every picture in docs/images."""
    for section in sections(all_rows(measured(records)), "perplexity"):
        if any(len(one.points) > 1 for one in series_of(section)):
            yield _image(section), f"Perplexity against window, {section.title}", section
    for recipe in COVERED:
        yield f"coverage-{recipe}.svg", f"What training with the recipe {recipe} sees", recipe


def _image(section: Section) -> str:
    protocol = "" if section.labels["protocol"] == "whole" else section.labels["protocol"]
    return slug("perplexity", section.labels["corpus"], *([protocol] if protocol else [])) + ".svg"


def image_files(records: Sequence[Record]) -> list[str]:
    """Names of the pictures."""
    return [file for file, _, _ in _figures(records)]


def draw(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """Draw every picture into `folder`."""
    for file, _, what in _figures(records):
        if isinstance(what, Section):
            drawing = perplexity_figure(what, name=file.removesuffix(".svg"))
            assert drawing is not None, "a series of several windows can be drawn"
            yield drawing.save(folder / file)
        else:
            yield _draw_coverage(what, folder / file)


def _draw_coverage(recipe_name: str, path: Path) -> Path:
    from e2llm.positions.coverage import coverage
    from e2llm.positions.placement import PositionSampler

    recipe = load_recipe(recipe_name)
    sampler = PositionSampler(
        native_window=recipe.model.native_window or COVERAGE_WINDOW,
        training_window=recipe.data.window,
        scales=recipe.scales,
        placement=recipe.placement,
        seed=recipe.seed,
        num_samples=recipe.train.steps * recipe.train.batch_size,
    )
    return write_coverage(coverage(sampler), recipe.name, path)
