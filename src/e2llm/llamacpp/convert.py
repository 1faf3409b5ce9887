"""A checkpoint as the GGUF folder that this engine reads: found where it is one already, made once where it is not.

Flows in: a name as the user gives it. Flows out: the path of a .gguf file, with e2llm.json and tokenizer beside it
where the name was a checkpoint. What is made is verified by the export and stands whole in the cache or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from e2llm.hf.checkpoint import FILE_NAME

CACHE = Path(".e2llm-cache") / "gguf"
"""Beside `runs/`, where data keeps its tokens too."""
KINDS = {None: "bf16", "auto": "bf16", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""dtype as for other engines -> storage of the matrices."""
_PROBE_CHARACTERS = 2500
_FORM = 1
"""Of what is cached; another number makes everything anew."""


def find_gguf(name: str, *, dtype: str | None = None, cache: Path = CACHE, tell: Callable[[str], None]) -> Path:
    """The file to serve. `dtype`: storage of one that has to be made; None: bfloat16. Raises ValueError for what is no
    model, for a folder with several files, and for a dtype with a file that is there already."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or (path.is_dir() and not _is_checkpoint(path)):
        found = path if path.suffix == ".gguf" else _only_file(path)
        if dtype is not None:
            raise ValueError(f"dtype = {dtype!r}: {found.name} is stored as it is; leave dtype out")
        return found
    if dtype not in KINDS:
        raise ValueError(f"dtype = {dtype!r}: choose one of {', '.join(k for k in KINDS if k)}")
    kind = KINDS[dtype]
    folder = cache / f"{_title(path)}-{kind}-{_fingerprint(path, kind)}"
    if not folder.is_dir():
        _convert(name, folder, kind, tell)
    return _only_file(folder)


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"model = {str(folder)!r}: the folder holds neither a config.json nor a .gguf file")
    raise ValueError(f"model = {str(folder)!r}: {len(found)} .gguf files; name one of them")


def _title(path: Path) -> str:
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name


def _fingerprint(path: Path, kind: str) -> str:
    """Of the files that a conversion depends on: names, sizes and times, and all of e2llm.json. A hub name is its own:
    what the hub holds is looked at once."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    told = path / FILE_NAME
    key = {
        "form": _FORM,
        "kind": kind,
        "name": str(path.resolve()) if files else str(path),
        "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file() and f != told],
        "told": told.read_text(encoding="utf-8") if told.is_file() else None,
    }
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _clear_abandoned(folder: Path) -> None:
    """Take away what processes that are gone had begun to write for `folder`."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _convert(name: str, folder: Path, kind: str, tell: Callable[[str], None]) -> None:
    """Export beside `folder` and put it in place; of two processes that do so at once the first one's stays."""
    from e2llm.export import export

    _clear_abandoned(folder)
    tell(f"writing {name} as GGUF ({kind}) into {folder}, once")
    made = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            # Text is cut into tokens by the checkpoint's own tokenizer here, not by llama.cpp's.
            warnings.filterwarnings("ignore", message="tokenizer.ggml.pre", category=UserWarning)
            # In float32 whatever is stored: torch's own bfloat16 sums would differ by more than a wrong scale does.
            # Some hundred tokens of text are enough for that, and whoever starts a server waits for it.
            text = Path(str(argparse.__file__)).read_text(encoding="utf-8")[:_PROBE_CHARACTERS]
            result = export(name, made, to="gguf", gguf_type=kind, dtype="float32", device="cpu", verify_text=text)
        for check in result.checks:
            tell(check.line())
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
