"""Collect the pretraining text of the embedded base: prose given as files, Python from the library and packages.

    python scripts/tiny_base/corpus.py --text FOLDER --packages SITE_PACKAGES [MORE ...] --out build/tiny/corpus

In: a folder with the PROSE files (documents separated by a line `<|endoftext|>`), folders that hold installed packages,
and the running Python's standard library without the quickstart's held-out files. Out: python.txt, prose.txt,
held_out_prose.txt (the same separator) and sources.json (documents, bytes and licence of each source, and what was
left out as a near copy of a held-out file). The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from e2llm.data.stdlib_files import stdlib_documents

SEPARATOR = "<|endoftext|>"
PROSE = {  # pattern of file names: (licence, every n-th document is held out)
    "books_classic_*.txt": ("public domain", 0),
    "docs_peps.txt": ("public domain / CC0-1.0", 60),
    "textbooks_openstax.txt": ("CC BY 4.0, OpenStax", 40),
}
PACKAGES = {  # folder in site-packages: licence
    "accelerate": "Apache-2.0", "aiohttp": "Apache-2.0", "celery": "BSD-3-Clause", "datasets": "Apache-2.0",
    "django": "BSD-3-Clause", "flask": "BSD-3-Clause", "fontTools": "MIT", "fsspec": "BSD-3-Clause",
    "huggingface_hub": "Apache-2.0", "IPython": "BSD-3-Clause", "jinja2": "BSD-3-Clause", "markdown_it": "MIT",
    "matplotlib": "PSF-like (Matplotlib licence)", "mpmath": "BSD-3-Clause", "mypy": "MIT", "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause", "pandas": "BSD-3-Clause", "peft": "Apache-2.0", "pip/_internal": "MIT",
    "pyarrow": "Apache-2.0", "pydantic": "MIT", "pygments": "BSD-2-Clause", "_pytest": "MIT", "rich": "MIT",
    "scipy": "BSD-3-Clause", "sklearn": "BSD-3-Clause", "sqlalchemy": "MIT", "sympy": "BSD-3-Clause",
    "tornado": "Apache-2.0", "torch": "BSD-3-Clause", "transformers": "Apache-2.0", "twisted": "MIT",
    "werkzeug": "BSD-3-Clause",
}
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendor", "externals", "__pycache__", "locale", "extern"}
MAX_BYTES_PER_PACKAGE = 12_000_000
SHINGLE_LINES = 5
MAX_SHARED_WITH_HELD_OUT = 8
"""Shingles that a document may share with the held-out files: a licence header, not a copy."""
MAX_SEEN_SHARE = 0.5
"""A document of which more shingles than this share were seen before is left out as a duplicate."""


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_LINES consecutive non-blank lines, stripped."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return {hash("\n".join(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}


class Filter:
    """Keeps what is text, no near copy of the held-out files and not seen before."""

    def __init__(self) -> None:
        self.held_out: set[int] = set()
        for _, text in stdlib_documents(held_out=True):
            self.held_out |= shingles(text)
        self.seen: set[int] = set()
        self.near_copies: list[str] = []

    def accepts(self, name: str, text: str) -> bool:
        found = shingles(text)
        if len(found & self.held_out) > MAX_SHARED_WITH_HELD_OUT:
            self.near_copies.append(name)
            return False
        is_duplicate = len(found & self.seen) > MAX_SEEN_SHARE * max(len(found), 1)
        is_table = sum(map(str.isdigit, text)) > 0.15 * len(text) or len(text) > 200 * (text.count("\n") + 1)
        if is_duplicate or is_table or SEPARATOR in text:
            return False
        self.seen |= found
        return True


def package_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(path inside the package, text) of a package's Python sources, sorted by path."""
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.as_posix()):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts) or path.stat().st_size < 1024:
            continue
        try:
            yield relative.as_posix(), path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue


def collect_python(package_folders: list[Path], keep: Filter) -> Iterator[tuple[str, str, str, str]]:
    """Yield (source, licence, name, text): the standard library first, then the packages found."""
    for name, text in stdlib_documents(held_out=False):
        if keep.accepts(f"stdlib/{name}", text):
            yield "Python standard library", "PSF-2.0", name, text
    for package, licence in PACKAGES.items():
        folder = next((f / package for f in package_folders if (f / package).is_dir()), None)
        if folder is None:
            print(f"package {package}: not found, left out", file=sys.stderr)
            continue
        total = 0
        for name, text in package_documents(folder):
            if total < MAX_BYTES_PER_PACKAGE and keep.accepts(f"{package}/{name}", text):
                total += len(text.encode())
                yield package, licence, name, text


def collect_prose(folder: Path) -> Iterator[tuple[str, str, bool, str]]:
    """Yield (source, licence, is held out, text)."""
    for pattern, (licence, every) in PROSE.items():
        files = sorted(folder.glob(pattern))
        if not files:
            raise ValueError(f"--text {folder}: no file {pattern}; give the folder that holds {', '.join(PROSE)}")
        for file in files:
            documents = file.read_text(encoding="utf-8").split(f"{SEPARATOR}\n")
            for i, text in enumerate(documents):
                if text.strip():
                    yield file.name, licence, bool(every) and i % every == every - 1, text.strip("\n") + "\n"


def count(sources: dict, source: str, licence: str, text: str) -> None:
    entry = sources.setdefault(source, {"licence": licence, "documents": 0, "bytes": 0})
    entry["documents"] += 1
    entry["bytes"] += len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of the prose files")
    parser.add_argument("--packages", type=Path, nargs="+", required=True, help="folders that hold installed packages")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keep, sources = Filter(), {}
    with open(args.out / "python.txt", "w", encoding="utf-8") as out:
        for source, licence, _, text in collect_python(args.packages, keep):
            count(sources, source, licence, text)
            out.write(f"{text.rstrip()}\n{SEPARATOR}\n")
    with (open(args.out / "prose.txt", "w", encoding="utf-8") as out,
          open(args.out / "held_out_prose.txt", "w", encoding="utf-8") as held_out):
        for source, licence, is_held_out, text in collect_prose(args.text):
            if not is_held_out:
                count(sources, source, licence, text)
            (held_out if is_held_out else out).write(f"{text}{SEPARATOR}\n")
    record = {"sources": sources, "near_copies_left_out": keep.near_copies}
    (args.out / "sources.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
