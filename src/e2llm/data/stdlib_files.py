"""The running Python's standard library as text: real, long, always there, with a fixed held-out part.

Flows in: nothing but the interpreter. Flows out: (name, text) pairs in one order. Knows no tokenizer and no model.
The held-out names stand here and nowhere else, because two things must agree on them for ever: the pretraining of
the embedded base (scripts/tiny_base) and the quickstart's evaluation.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT: tuple[str, ...] = (
    "argparse.py",
    "difflib.py",
    "doctest.py",
    "email/_header_value_parser.py",
    "http/cookiejar.py",
    "inspect.py",
    "ipaddress.py",
    "logging/handlers.py",
    "mailbox.py",
    "optparse.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "unittest/mock.py",
    "urllib/request.py",
    "xml/dom/minidom.py",
)
"""Kept for evaluation. Each exists as one file in Python 3.11 to 3.14 and has more than 8192 tokens of tiny-512."""

SKIPPED_FOLDERS = frozenset(
    # tests, demos and bundles; idlelib and lib2to3 come and go with versions; encodings are tables of code points
    """test tests idle_test turtledemo idlelib lib2to3 ensurepip encodings pydoc_data site-packages dist-packages
    __pycache__ __phello__""".split()
)

MIN_BYTES = 1024
"""Smaller files are imports and little else."""


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents(held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the library with forward slashes, text), sorted by path.

    `held_out` chooses the part: the files of HELD_OUT, or all others. Files that are not UTF-8, shorter than MIN_BYTES
    or made when Python was built (`_sysconfigdata…`) are left out. A held-out file that this Python lacks raises
    `ValueError`: an evaluation over fewer files would not be the same evaluation.
    """
    root = stdlib_root()
    if held_out:
        yield from _held_out(root)
        return
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if name in HELD_OUT or path.name.startswith("_sysconfigdata") or SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        text = _read(path)
        if text is not None:
            yield name, text


def _held_out(root: Path) -> Iterator[tuple[str, str]]:
    missing = [name for name in HELD_OUT if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"standard library in {root}: {', '.join(missing)} not found; install Python's full standard library, "
            "or name your own text with data.sources"
        )
    for name in HELD_OUT:
        text = _read(root / name)
        if text is None:
            raise ValueError(f"standard library file {root / name}: not UTF-8 or empty; reinstall Python")
        yield name, text


def _read(path: Path) -> str | None:
    raw = path.read_bytes()
    if len(raw) < MIN_BYTES:
        return None
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
