"""Make everything in the documentation that is made: python scripts/docs.py [--check]

    docs/results.md, docs/images/*.svg, the tables in README.md   from benchmarks/results/*.json
    docs/evaluation.md                                            from benchmarks/results/evaluate_*.json
    docs/study.md                                                 from benchmarks/study.toml and its Records
    docs/study-tiny.md                                            from benchmarks/tiny.toml and its Records
    docs/training-speed.md                                        from benchmarks/results/train_*.json
    docs/clusters.md                                              from the arithmetic of e2llm plan
    docs/cli.md, docs/api.md, docs/recipes.md                     from the code and the shipped recipes

--check writes nothing and exits 1, naming the files, if a page differs from what would be written or a picture is
missing. Pictures are not compared byte by byte: matplotlib versions differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docs_clusters
import docs_evaluation
import docs_final
import docs_reference
import docs_results
import docs_study
import docs_tiny
import docs_training

from e2llm.records import Record, write_atomic
from e2llm.report import Drawing

ROOT = Path(__file__).parent.parent
MARKER = "<!-- generated: {name} -->"
END = "<!-- end: {name} -->"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """File -> the text it should hold."""
    records = docs_results.load(root / "benchmarks" / "results")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name, text in (
        ("headline", docs_final.headline(records)),
        ("final", "\n\n".join(docs_final.readme_block(records))),
        ("quickstart", docs_results.quickstart_block(records)),
    ):
        readme = fill(readme, name, text)
    return {
        root / "README.md": readme,
        root / "docs" / "results.md": docs_results.results_page(records),
        root / "docs" / "evaluation.md": docs_evaluation.evaluation_page(records),
        root / "docs" / "study.md": docs_study.study_page(ROOT, records),
        root / "docs" / "study-tiny.md": docs_tiny.tiny_page(ROOT, records),
        root / "docs" / "training-speed.md": docs_training.training_page(records),
        root / "docs" / "clusters.md": docs_clusters.clusters_page(),
        root / "docs" / "cli.md": docs_reference.cli_page(),
        root / "docs" / "api.md": docs_reference.api_page(),
        root / "docs" / "recipes.md": docs_reference.recipes_page(),
    }


def fill(text: str, name: str, block: str) -> str:
    """`text` with `block` between the markers of `name`. ValueError where the markers are not there once."""
    start, end = MARKER.format(name=name), END.format(name=name)
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README.md: expected {start} … {end} once")
    inside = f"\n\n{block}\n\n" if block else "\n"
    return pattern.sub(lambda _: f"{start}{inside}{end}", text)


def outdated(root: Path = ROOT) -> list[str]:
    """Pages that differ from what the sources say, and pictures that are missing."""
    found = []
    for path, text in pages(root).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(str(path.relative_to(root)))
    records = docs_results.load(root / "benchmarks" / "results")
    images = [*docs_results.image_files(records), *_drawings(records)]
    return found + [f"docs/images/{file}" for file in images if not (root / "docs" / "images" / file).is_file()]


def _drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    parts = (docs_training, docs_evaluation, docs_final)
    return {file: drawing for part in parts for file, drawing in part.image_drawings(records).items()}


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    if parser.parse_args().check:
        found = outdated()
        for name in found:
            print(f"{name} is out of date: run python scripts/docs.py", file=sys.stderr)
        return 1 if found else 0
    for path, text in pages().items():
        write_atomic(path, text)
        print(path.relative_to(ROOT))
    records, images = docs_results.load(ROOT / "benchmarks" / "results"), ROOT / "docs" / "images"
    for path in docs_results.draw(records, images):
        print(path.relative_to(ROOT))
    for file, drawing in _drawings(records).items():
        print(drawing.save(images / file).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
