"""`e2llm.json`: beside a checkpoint's weights, how it was trained. The weights themselves are a plain HF folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import parse_schedule
from e2llm.positions.frequencies import METHODS
from e2llm.version import __version__

FILE_NAME = "e2llm.json"
SCHEMA = 1


def current_versions(*packages: str) -> dict[str, str]:
    """Our version and those of installed `packages`."""
    return {"e2llm": __version__, **{name: importlib.metadata.version(name) for name in packages}}


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a server or an evaluation must know of a checkpoint."""

    method: str
    """Frequency method it was trained with."""
    native_window: int
    """L in tokens."""
    training_window: int
    """R in tokens."""
    max_scale: float
    """Largest scale that training drew; 1 for plain fine-tuning."""
    placement: dict[str, Any] = field(default_factory=dict)
    """The placement section of the recipe."""
    scales: dict[str, Any] = field(default_factory=dict)
    """The scales section of the recipe."""
    attention: dict[str, Any] = field(default_factory=dict)
    """The attention section of the recipe: slopes of the attention scale. Empty: the method's own."""
    neighbours: int = 0
    """Method self_extend: tokens that keep their distance, as in training. 0 with other methods."""
    schedule: list[dict[str, Any]] = field(default_factory=list)
    """Calibrated scale for each window, [{"window": tokens, "scale": g}, …], windows rising. Empty: the ladder."""
    base_model: str = ""
    """Name of the model that was extended."""
    checkpoint: str = ""
    """Name of the recipe: plain, paper, recommended, ..."""
    seed: int = 0
    steps: int = 0
    """Optimizer steps taken."""
    interpolation: float = 1.0
    """Share of the way from the base's weights to the trained ones at which these lie."""
    tokens: int = 0
    """Tokens trained on."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """Provenance of each source."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of what trained it."""

    def attention_config(self) -> AttentionConfig:
        """The attention section, parsed."""
        return AttentionConfig(**self.attention)

    def save(self, folder: str | Path) -> Path:
        """Write e2llm.json into `folder`, atomically."""
        path = Path(folder) / FILE_NAME
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> CheckpointInfo | None:
        """Read e2llm.json of a folder; None where there is none. Raises ValueError for one we cannot read, naming
        file and field."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not an e2llm.json ({error})") from error
        if not isinstance(raw, dict) or "schema" not in raw:
            raise ValueError(f"{path}: not an e2llm.json (expected a JSON object with a schema)")
        schema = raw.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA}; update e2llm")
        known = {f.name for f in dataclasses.fields(cls)}
        missing = {"method", "native_window", "training_window", "max_scale"} - raw.keys()
        if missing or raw.keys() - known:
            raise ValueError(f"{path}: missing {sorted(missing)}, unknown {sorted(raw.keys() - known)}")
        _check_values(raw, path)
        return cls(**raw)


def assumed_without_info(name: str, method: str, native_window: int) -> str:
    """One line for whoever serves a checkpoint that has no e2llm.json."""
    return (
        f"no e2llm.json with {name}: assuming method {method}, native window {native_window} (the model's own) and no "
        "training beyond it"
    )


def _check_values(raw: dict[str, Any], path: Path) -> None:
    """Raise ValueError naming `path` and the field whose value a checkpoint cannot have."""
    hints = typing.get_type_hints(CheckpointInfo)
    for name, value in raw.items():
        expected = typing.get_origin(hints[name]) or hints[name]
        number = expected is float and isinstance(value, int)
        if isinstance(value, bool) or not (number or isinstance(value, expected)):
            raise ValueError(f"{path}: {name} = {value!r}: expected {expected.__name__}, got {type(value).__name__}")
    if raw["method"] not in METHODS:
        raise ValueError(f"{path}: method = {raw['method']!r}: this version knows {', '.join(METHODS)}")
    try:
        AttentionConfig(**raw.get("attention", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: attention = {raw['attention']!r}: {error}") from error
    try:
        parse_schedule(raw.get("schedule", []))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in ("native_window", "training_window"):
        if raw[name] < 1:
            raise ValueError(f"{path}: {name} = {raw[name]}: must be at least 1 token")
    near = raw.get("neighbours", 0)
    if (raw["method"] == "self_extend") != (0 < near < raw["native_window"]):
        raise ValueError(
            f"{path}: neighbours = {near}: with method self_extend from 1 to less than native_window, with others 0"
        )
    if not math.isfinite(raw["max_scale"]) or raw["max_scale"] < 1:
        raise ValueError(f"{path}: max_scale = {raw['max_scale']}: a scale is a finite ratio of at least 1")
