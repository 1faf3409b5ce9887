"""Recipes: a TOML file and `--set key=value` become frozen dataclasses, or an error that names the key.

Flows in: TOML text and overrides. Flows out: `Recipe`. Knows no torch, no model and no file but the recipe.
Unknown keys are errors with a suggestion; every default lives in the dataclasses of the sections (`config_sections`,
`config_distributed`, `positions`) and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from e2llm.config_distributed import DistributedConfig
from e2llm.config_sections import DataConfig, LoraSection, ModelConfig, TrainConfig, require
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.placement import PlacementConfig
from e2llm.positions.scales import ScalesConfig

Method = Literal["none", "linear", "ntk", "yarn", "longrope", "self_extend"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run."""

    name: str = "recommended"
    """Label of the checkpoint in Records and tables."""
    output: str = ""
    """Folder of the run; empty means runs/<name>."""
    seed: int = 0
    """Seed of scales, placements and adapters. With the sample's index it decides every draw; the order of windows and
    what is held out follow data.seed."""
    method: Method = "yarn"
    """Frequency method that is trained; with self_extend the scale is that of far keys' groups instead."""
    neighbours: int = 0
    """Method self_extend: tokens that keep their distance; 0: a quarter of the native window."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        require(
            not (self.distributed.global_batch and self.train.gradient_accumulation > 1),
            "train.gradient_accumulation",
            self.train.gradient_accumulation,
            "it follows from distributed.global_batch; leave it out",
        )
        self.placement.check_window(self.data.window)
        if self.data.pieces != "row":
            self._check_pieces()
        if self.model.quantization != "none":
            self._check_quantized()
        if self.model.offload != "none":
            self._check_offloaded()
        if self.method == "self_extend":
            self._check_grouped()
        text = f"only method self_extend has them, not {self.method}: leave it out"
        require(self.neighbours == 0 or self.method == "self_extend", "neighbours", self.neighbours, text)
        split = self.train.optimizer == "adamw_split"
        low_precision = self.model.dtype in ("bfloat16", "float16")
        require(
            not (low_precision and self.lora.rank == 0 and not split),
            "model.dtype",
            self.model.dtype,
            "full fine-tuning loses small updates to rounding in 16-bit weights; use float32 (arithmetic stays "
            "train.precision), bfloat16 with train.optimizer = adamw_split, or train adapters with lora.rank",
        )
        if split:
            self._check_split()
        require(
            not self.train.distill or self.distributed.strategy in ("none", "ddp"),
            "train.distill",
            self.train.distill,
            f"keeps a whole copy of the base in each process; distributed.strategy = {self.distributed.strategy} "
            "shards what would not fit: use strategy ddp, or train.distill = 0",
        )
        require(
            not self.data.weighs_tokens or self.train.logits_tokens > 0,
            "data.planted_weight",
            self.data.planted_weight,
            "only the loss in pieces weighs tokens: use train.logits_tokens = 8192, or data.planted_weight = 1",
        )
        flash = "flash" in (self.model.attn_implementation or "")
        require(
            not (self.data.document_mask and flash and self.train.batch_size > 1),
            "train.batch_size",
            self.train.batch_size,
            "data.document_mask with flash attention needs 1 (and train.gradient_accumulation): transformers looks for "
            "documents in batches of one row alone, in others they would see each other; or use "
            "model.attn_implementation = flex_attention",
        )
        require(
            self.distributed.tensor_parallel == 1 or self.lora.rank == 0,
            "distributed.tensor_parallel",
            self.distributed.tensor_parallel,
            f"trains all weights, and lora.rank = {self.lora.rank} asks for adapters: use tensor_parallel = 1",
        )

    def accumulation(self, processes: int) -> int:
        """Batches that each of `processes` adds up before a step. Raises ValueError where the global batch does not
        divide."""
        whole, batch, share = self.distributed.global_batch, self.train.batch_size, self.distributed.tensor_parallel
        groups = processes // share
        if not whole:
            return self.train.gradient_accumulation
        if whole % (batch * groups):
            kind = "processes" if share == 1 else f"groups of {share} processes (distributed.tensor_parallel)"
            raise ValueError(
                f"distributed.global_batch = {whole}: not a multiple of train.batch_size x {kind} = {batch} x {groups}"
                f"; set train.batch_size to a divisor of {whole / groups:g}, or another global batch"
            )
        return whole // (batch * groups)

    def _check_pieces(self) -> None:
        name, value, kind = "data.pieces", self.data.pieces, self.placement.kind
        require(not self.data.document_mask, name, value, "a window has one document then: data.document_mask = false")
        # In randpos every token jumps, in none no one does.
        few = kind in ("paper", "jumps", "pose", "end_anchor")
        require(few, name, value, f"placement.kind = {kind} has no pieces: use jumps, paper, pose or end_anchor")

    def _check_quantized(self) -> None:
        name, value = "model.quantization", self.model.quantization
        require(self.lora.rank > 0, name, value, "4-bit weights cannot be trained: set lora.rank, such as 16")
        require(
            self.model.dtype == "bfloat16",
            name,
            value,
            f"what stays whole (embeddings, norms, output) is of model.dtype = {self.model.dtype}: use bfloat16",
        )
        require(not self.model.name.endswith(".gguf"), name, value, "a GGUF file has a quantization of its own")
        require(
            not self.train.distill, name, value, "a teacher would be a second base in memory: use train.distill = 0"
        )
        require(
            self.distributed.strategy in ("none", "ddp"),
            name,
            value,
            f"distributed.strategy = {self.distributed.strategy} cannot shard 4-bit weights: use ddp",
        )

    def _check_offloaded(self) -> None:
        name, value, config = "model.offload", self.model.offload, self.train
        whole = "; for all weights use distributed.strategy = fsdp2 or deepspeed with distributed.cpu_offload"
        text = f"only a frozen base can wait elsewhere: set lora.rank, such as 16{whole}"
        require(self.lora.rank > 0, name, value, text)
        require(
            config.gradient_checkpointing,
            name,
            value,
            "without train.gradient_checkpointing = true the backward pass would hold every weight that was fetched",
        )
        require(self.model.quantization == "none", name, value, "4-bit weights cannot be fetched by hooks: use either")
        require(config.compile == "none", name, value, "fetching weights breaks compiled layers: train.compile = none")
        require(not config.distill, name, value, "a teacher would be a second base in memory: use train.distill = 0")
        require(
            self.distributed.strategy == "none",
            name,
            value,
            f"is for one process; with distributed.strategy = {self.distributed.strategy} use distributed.cpu_offload "
            "(fsdp2, deepspeed)",
        )

    def _check_grouped(self) -> None:
        require(self.neighbours >= 0, "neighbours", self.neighbours, "use tokens, or 0 for a quarter of the window")
        name, value, own = "method", self.method, self.model.attn_implementation
        text = f"brings its own attention: leave model.attn_implementation = {own} out"
        require(own in (None, "sdpa"), name, value, text)

    @property
    def weighs_by_channels(self) -> bool:
        """Whether far keys are weighed by channels beside a model's own attention; self_extend's does it itself."""
        return self.placement.far_weight > 0 and self.method != "self_extend"

    def _check_split(self) -> None:
        name, value = "train.optimizer", self.train.optimizer
        require(self.model.dtype == "bfloat16", name, value, f"needs model.dtype = bfloat16, not {self.model.dtype}")
        require(self.train.precision == "bfloat16", name, value, "needs train.precision = bfloat16")
        require(self.lora.rank == 0, name, value, "adapters are float32 already: use adamw with lora.rank")
        require(
            self.distributed.strategy in ("none", "ddp"),
            name,
            value,
            f"distributed.strategy = {self.distributed.strategy} keeps float32 masters itself: use adamw",
        )
        require(
            self.train.gradient_accumulation == 1,
            name,
            value,
            "gradients of several batches would be added up in bfloat16; use train.gradient_accumulation = 1 and a "
            "larger train.batch_size, or adamw",
        )

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output or f"runs/{self.name}")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package: those to start from, then the study's baselines."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for place in (folder, folder / "study") for path in sorted(place.glob("*.toml"))}


def load_recipe(name_or_path: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Recipe from a shipped name or a TOML file, with `section.key=value` overrides applied.

    Raises ValueError naming file and key for what cannot be read.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, shipped, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"recipe = {name_or_path!r}: no such file; {hint}shipped recipes: {', '.join(shipped)}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, where=str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Recipe from nested plain values. Raises ValueError that names `where` and the key."""
    recipe = _build(Recipe, raw, "", where)
    assert isinstance(recipe, Recipe)
    return recipe


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override!r}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: --set model.name=some/model
    *sections, last = key.strip().split(".")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override!r}: {section!r} is not a section")
    table[last] = value


def _build(cls: type, raw: Any, prefix: str, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'recipe'} = {raw!r}: expected a table of keys")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{close[0]!s}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {prefix}{key}; {hint}")
    values = {key: _convert(hints[key], value, f"{prefix}{key}", where) for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, f"{key}.", where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: {key} = {value!r}: expected a list")
        return tuple(_convert(arguments[0], item, key, where) for item in value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {key} = {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _convert(inner, value, key, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {key} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")


def to_plain(config: Any) -> dict[str, Any]:
    """Nested plain values of a config; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    result = plain(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load_recipe` reads back to an equal one. None means absent."""

    def value_of(value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str):
            return _toml_string(value)
        if isinstance(value, list):
            return "[" + ", ".join(value_of(item) for item in value) + "]"
        return repr(value)

    def lines_of(table: dict[str, Any]) -> list[str]:
        return [f"{k} = {value_of(v)}" for k, v in table.items() if v is not None and not isinstance(v, dict)]

    plain = to_plain(recipe)
    sources = plain["data"].pop("sources")
    lines = lines_of(plain)
    for section, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *lines_of(table)]
    for source in sources:
        lines += ["", "[[data.sources]]", *lines_of(source)]
    return "\n".join(lines) + "\n"


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped)
    return f'"{escaped}"'
