"""Records: what was measured, with its configuration and environment, as one JSON file.

Flows in: rows (aggregates), examples (single results), a resolved configuration. Flows out: a JSON file and back.
Knows no torch, no model and no metric's meaning beyond the range a known metric can take. The format:

    {"schema": 1, "kind": "evaluate", "environment": {...}, "config": {...}, "rows": [...], "examples": [...]}

A row is flat: metric, value, unit, n, labels, and where it has one a confidence interval, low and high. No two rows of
a Record share metric and labels.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from e2llm.version import __version__

SCHEMA = 1

ROW_FIELDS = ("metric", "value", "unit", "n")
"""What every row has."""

INTERVAL_FIELDS = ("low", "high", "interval")
"""Ends of the confidence interval, in the row's unit: both or none; `interval`, where it says what else it is over.
All other keys of a row are labels."""

LABELS = (
    "base_model", "checkpoint", "method", "corpus", "protocol", "window", "scale", "native_window", "task", "depth",
    "split", "step", "seed", "language", "trainer", "engine", "mix", "gpu", "gpus", "position", "choice",
    "suite", "average", "beyond_trained", "depths",
)  # fmt: skip
"""Labels the project uses: one spelling for one thing. Other labels are allowed; these come first in tables."""

SCORES = ("accuracy", "f1", "rouge_l", "edit_similarity", "average")
"""Metrics of tasks that are answered in text, all shares: 0 to 1. `average` is a mean over tasks."""

METRIC_RANGES = {
    "perplexity": (1.0, math.inf),
    "key_perplexity": (1.0, math.inf),
    "loss": (0.0, math.inf),
    **{
        name: (0.0, 1.0)
        for name in (
            *SCORES,
            *("retrieval", "string_match", "key_share", "attention_on_span", "attention_on_others"),
            *("attention_if_even", "attention_of_best_head"),
        )
    },
}
"""Metric -> lowest and highest value that is possible. perplexity: ratio; retrieval: share; loss: nats a token."""

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "triton", "liger-kernel",
    "bitsandbytes", "deepspeed", "litgpt", "unsloth",
)  # fmt: skip
"""Packages whose versions figures depend on: what runs a model, kernels, and the trainers that ours stands beside."""

_METRIC = re.compile(r"[a-z][a-z0-9_]*")
_KEYS = ("schema", "kind", "environment", "config", "rows", "examples")


@dataclass(frozen=True)
class Record:
    """One measurement run. `path` is the file it was loaded from; it is not part of what is saved."""

    kind: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=lambda: environment_snapshot())
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_record(self, where=str(self.path) if self.path else f"Record of kind {self.kind!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the Record beside `path` and move it there in one step; the folder is made if it is missing."""
        check_record(self, where=str(path))  # rows are lists: someone may have added to them since
        return write_atomic(Path(path), _to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read and check a Record. ValueError names the file and, where one is wrong, the row."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError as error:
            raise ValueError(f"{path}: no Record that can be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: no JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        _check_document(document, path)
        return cls(**{key: document[key] for key in _KEYS if key != "schema"}, path=path)


def make_row(metric: str, value: float, unit: str, n: int, **labels: Any) -> dict[str, Any]:
    """One flat row, checked. `n`: how many observations (target tokens, prompts, …) `value` sums up, at least 1.

    `low` and `high` among the labels are the row's confidence interval.
    """
    clash = sorted(set(labels) & set(ROW_FIELDS))
    if clash:
        raise ValueError(f"labels = {clash}: these names are the row's own fields; choose others")
    row = {"metric": metric, "value": float(value), "unit": unit, "n": n, **labels}
    check_row(row, where="make_row")
    return row


def labels_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without metric, value, unit, n and interval."""
    return {key: value for key, value in row.items() if key not in ROW_FIELDS + INTERVAL_FIELDS}


def merge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """All rows, each with a label `source`: its Record's file stem, with as many folders as tell it from the others."""
    return [
        {**row, "source": name}
        for record, name in zip(records, source_names(records), strict=True)
        for row in record.rows
    ]


def source_names(records: Sequence[Record]) -> list[str]:
    """A short name for each Record, unique among them; one that was not loaded from a file is called by its kind."""
    parts = [(*r.path.resolve().parts[1:-1], r.path.stem) if r.path else (r.kind,) for r in records]
    names = []
    for index, own in enumerate(parts):
        others = [other for place, other in enumerate(parts) if place != index]
        for depth in range(1, len(own) + 1):
            if all(other[-depth:] != own[-depth:] for other in others):
                names.append("/".join(own[-depth:]))
                break
        else:  # the same file twice, or two unsaved Records of one kind
            names.append(f"{own[-1]} #{1 + sum(other == own for other in parts[:index])}")
    return names


def check_record(record: Record, *, where: str) -> None:
    """ValueError that starts with `where` if the Record could not be saved, or could not be trusted once it is."""
    if not isinstance(record.kind, str) or not record.kind:
        raise ValueError(f"{where}: kind = {record.kind!r}: say what was measured, such as 'evaluate' or 'train'")
    for name, kind in (("config", dict), ("environment", dict), ("rows", list), ("examples", list)):
        value = getattr(record, name)
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {name} is a {type(value).__name__}: it has to be a {kind.__name__}")
        if name != "rows":
            _check_json(value, where=f"{where}: {name}")
    seen: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(record.rows):
        check_row(row, where=f"{where}: rows[{index}]")
        key = (row["metric"], frozenset(labels_of(row).items()))
        if key in seen:
            raise ValueError(
                f"{where}: rows[{index}] repeats rows[{seen[key]}], {row['metric']} with labels {labels_of(row)}: "
                "keep one of the two, or add the label that tells them apart"
            )
        seen[key] = index


def check_row(row: Any, *, where: str) -> None:
    """ValueError that starts with `where` unless `row` is a flat row as described at the top of this file."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: a row is an object")
    missing = [name for name in ROW_FIELDS if name not in row]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}: every row has {', '.join(ROW_FIELDS)}")
    metric, value, unit, n = (row[name] for name in ROW_FIELDS)
    if not isinstance(metric, str) or not _METRIC.fullmatch(metric):
        raise ValueError(f"{where}: metric = {metric!r}: use lower-case letters, digits and underscores")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: value = {value!r}: use a finite number; leave out what could not be measured")
    low, high = METRIC_RANGES.get(metric, (-math.inf, math.inf))
    if not low <= value <= high:
        raise ValueError(f"{where}: value = {value!r}: {metric} lies between {low:g} and {high:g}")
    if not isinstance(unit, str) or not unit:
        raise ValueError(f"{where}: unit = {unit!r}: name the unit, such as 'ratio', 'share' or 'nats'")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{where}: n = {n!r}: use the number of observations, a whole number from 1 up")
    _check_interval(row, where=where)
    for key, label in labels_of(row).items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"{where}: label {key!r}: a label's name is text")
        if not (label is None or type(label) in (str, int, float, bool)):
            raise ValueError(f"{where}: {key} = {label!r}: a label is text, a number, true, false or null")
        if isinstance(label, float) and not math.isfinite(label):
            raise ValueError(f"{where}: {key} = {label!r}: a label's number is finite")


def _check_interval(row: Mapping[str, Any], *, where: str) -> None:
    ends = [row.get(name) for name in INTERVAL_FIELDS[:2]]
    kind = row.get("interval")
    if kind is not None and (not isinstance(kind, str) or not kind or ends == [None, None]):
        raise ValueError(f"{where}: interval = {kind!r}: text that says what low and high are over; leave it out else")
    if ends == [None, None]:
        return
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) for end in ends):
        raise ValueError(f"{where}: low, high = {ends}: an interval has two finite ends; leave both out without one")
    low, high = METRIC_RANGES.get(row["metric"], (-math.inf, math.inf))
    if not low <= ends[0] <= ends[1] <= high:  # type: ignore[operator]
        raise ValueError(f"{where}: low, high = {ends}: in this order, and {row['metric']} lies in {low:g} to {high:g}")


def portable(value: Any) -> Any:
    """Nested plain values as they may be published: absolute paths keep their last name only."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def environment_snapshot() -> dict[str, Any]:
    """Where this runs: Python, platform, processor, versions of e2llm and of `PACKAGES` (None: not installed), time.

    GPU names and their count only if torch is imported already: asking must not cost its import.
    """
    snapshot: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # Not the installed package's: what runs may be a checkout beside it, or the only one there is.
        "e2llm": __version__,
        **{name: _version(name) for name in PACKAGES},
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        snapshot["gpu"] = torch.cuda.get_device_name(0)
        snapshot["gpus"] = torch.cuda.device_count()
    return snapshot


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 `text` to a file beside `path`, then put it in place: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes files private; results are for others too
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_out(path: str | os.PathLike[str], field: str = "out") -> None:
    """ValueError where no file can be written at `path`: to be asked before hours of work. Leaves nothing behind."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{field} = {str(path)!r}: it is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"{field} = {str(path)!r}: {folder} cannot be written ({why}); name another place") from error


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def _to_json(record: Record) -> str:
    """Indented JSON with one line a row and one line an example, so that a changed row is a changed line."""
    parts = [f'"schema": {SCHEMA}']
    for name in _KEYS[1:]:
        value = getattr(record, name)
        if name in ("rows", "examples") and value:
            lines = ",\n".join(f"    {_dumps(item)}" for item in value)
            parts.append(f'"{name}": [\n{lines}\n  ]')
        else:
            parts.append(f'"{name}": ' + _dumps(value, indent=2).replace("\n", "\n  "))
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def _dumps(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


def _check_json(value: Any, *, where: str) -> None:
    try:
        _dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error


def _check_document(document: Any, path: Path) -> None:
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(
            f"{path}: no Record: an object with schema, kind, environment, config, rows and examples is expected"
        )
    if document["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: schema = {document['schema']!r}: this version reads {SCHEMA}; use the e2llm that wrote it"
        )
    missing, unknown = sorted(set(_KEYS) - set(document)), sorted(set(document) - set(_KEYS))
    if missing or unknown:
        complaint = [f"no {name}" for name in missing] + [f"unknown key {name!r}" for name in unknown]
        raise ValueError(f"{path}: {', '.join(complaint)}: a Record has exactly {', '.join(_KEYS)}")
    if not all(isinstance(item, dict) for item in _as_list(document["examples"])):
        raise ValueError(f"{path}: examples: each is an object")


def _as_list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else []


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} stands for a number: a Record holds finite numbers only")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    import importlib.metadata  # as slow to import as all the rest of this file, and seldom needed

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
