"""Recipes: a TOML file and `--set key=value` become frozen dataclasses, or an error that names the key.

Flows in: TOML text and overrides. Flows out: `Recipe`. Knows no torch, no model and no file but the recipe.
Unknown keys are errors with a suggestion; every default lives in these dataclasses (and those of `positions`) and
nowhere else.
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
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.placement import PlacementConfig
from e2llm.positions.scales import ScalesConfig

Method = Literal["none", "linear", "ntk", "yarn", "longrope"]
DType = Literal["float32", "bfloat16", "float16", "auto"]


def _require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{field_name} = {value!r}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which pretrained model is extended."""

    name: str = ""
    """Folder, hub name or .gguf file of the base model."""
    dtype: DType = "float32"
    """Type of the weights. float32 keeps master weights; bfloat16 is for frozen bases under LoRA, and for
    train.optimizer = adamw_split, which keeps what the weights lack."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: a frozen base of 4-bit normal floats under adapters (QLoRA, Dettmers et al. 2023), by bitsandbytes. What is
    saved at the end are whole weights of model.dtype with the adapters in them."""
    attn_implementation: str | None = None
    """transformers' attention backend (sdpa, eager, flex_attention, …); None lets transformers choose."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked for."""
    native_window: int | None = None
    """L in tokens; None reads it off the model's config."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text and its share of the training windows."""

    path: str = ""
    """File or folder of .txt/.md/.py, .jsonl, .parquet; a `datasets` folder; or a hub data set as "hub:owner/name"."""
    weight: float = 1.0
    """Share of windows, relative to the other sources. 0 < weight."""
    text_column: str = "text"
    """Column of JSONL/Parquet/datasets that holds a document."""
    messages_column: str = "messages"
    """Column that holds a chat (list of {role, content}); used where present: loss on assistant tokens only."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set."""
    separator: str | None = None
    """A line that separates documents inside a text file; None takes a file as one document."""
    glob: str | None = None
    """For folders: only files that match, e.g. "**/*.py"."""
    synthetic: str | None = None
    """Name of a built-in generator ("key_values", "copies") instead of a path."""
    planted: float = 0.0
    """Share of the windows of plain text in which made-up facts are stated and asked for again."""

    def __post_init__(self) -> None:
        one = bool(self.path) != bool(self.synthetic)
        _require(one, "data.sources.path", self.path, "give path or synthetic, not both")
        _require(0 <= self.planted <= 1, "data.sources.planted", self.planted, "use a share between 0 and 1")
        plain = not (self.planted and self.synthetic)
        _require(plain, "data.sources.planted", self.planted, "facts are planted in text of a path; leave it out here")
        _require(self.weight > 0, "data.sources.weight", self.weight, "a weight is above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Ordinary short text, packed into windows."""

    sources: tuple[SourceConfig, ...] = ()
    window: int = 4096
    """R, tokens in a training window."""
    document_mask: bool = False
    """Keep packed documents apart: position ids restart at each, and attention does not cross."""
    held_out_fraction: float = 0.01
    """Share of documents, per source, kept for the evaluation loss. At least one document where a source has two."""
    seed: int = 0
    """Seed of the window order and of the held-out choice."""
    cache_dir: str = ".e2llm-cache"
    """Folder of the token cache."""

    def __post_init__(self) -> None:
        _require(self.window >= 8, "data.window", self.window, "use at least 8 tokens")
        _require(0 <= self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters (PEFT) instead of full fine-tuning."""

    rank: int = 0
    """0 trains all weights; above 0 trains adapters of this rank."""
    alpha: float = 32.0
    """LoRA alpha: the adapter is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout in front of the adapter."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get adapters; empty means all but the output layer."""
    train_embeddings: bool = False
    """Also train the token embeddings (LongLoRA's finding for long windows)."""
    train_norms: bool = False
    """Also train the normalisation layers."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "use 0 (full fine-tuning) or more")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "use a number above 0")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "use 0 to below 1")
        extras = self.train_embeddings or self.train_norms
        _require(self.rank > 0 or not extras, "lora.train_embeddings", extras, "without lora.rank all is trained")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, budget and bookkeeping."""

    steps: int = 850
    """Optimizer steps."""
    batch_size: int = 8
    """Windows a device takes at once."""
    gradient_accumulation: int = 1
    """Batches a device adds up before an optimizer step."""
    optimizer: Literal["adamw", "adamw_split"] = "adamw"
    """adamw: in the type of the weights. adamw_split: bfloat16 weights whose float32 masters are exact, because the 16
    bits that a weight lacks stand beside it. Faster and smaller than float32 weights under autocast; the residual
    stream is bfloat16 then, as in serving."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's two betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the forward and backward arithmetic; the weights keep model.dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    compile: Literal["none", "layers"] = "none"
    """torch.compile each decoder layer, and the loss."""
    logits_tokens: int = 8192
    """Tokens whose logits are held at once: the memory of logits does not grow with batch or window. 0: the model's own
    loss, which holds the logits of all."""
    distill: float = 0.0
    """Share of the loss, 0 to 1, that follows the base model's own predictions for the same window at scale 1 without
    offsets (KL divergence). Keeps what the base knew of short text; a step takes about a third longer."""
    evaluate_every: int = 0
    """Steps between evaluations of the held-out loss; 0 evaluates at the end only."""
    evaluate_scales: tuple[float, ...] = (1.0,)
    """Scales at which the held-out loss is measured."""
    evaluate_windows: int = 32
    """Held-out windows in one evaluation; 0 turns it off."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept (the best and the latest are never dropped). At least 2."""
    log_every: int = 10
    """Steps between log lines."""
    workers: int = 2
    """Processes that read windows and draw placements; 0 does it in the main one."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "use at least 1")
        counts = ("warmup_steps", "evaluate_every", "evaluate_windows", "save_every", "workers", "logits_tokens")
        for name in (*counts, "max_grad_norm"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "use 0 or more")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "use a number above 0")
        _require(0 <= self.distill <= 1, "train.distill", self.distill, "use a share from 0 to 1")
        _require(
            not self.distill or self.logits_tokens > 0,
            "train.distill",
            self.distill,
            "is computed with the loss in pieces: set train.logits_tokens above 0, such as 8192",
        )
        _require(len(self.betas) == 2, "train.betas", self.betas, "AdamW has two betas")
        _require(self.keep_checkpoints >= 2, "train.keep_checkpoints", self.keep_checkpoints, "use at least 2")
        _require(all(s >= 1 for s in self.evaluate_scales), "train.evaluate_scales", self.evaluate_scales, "use >= 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run."""

    name: str = "recommended"
    """Label of the checkpoint in Records and tables."""
    output: str = ""
    """Folder of the run; empty means runs/<name>."""
    seed: int = 0
    """Seed of scales, placements and window order. With the sample's index it decides every draw."""
    method: Method = "yarn"
    """Frequency method that is trained."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _require(
            not (self.distributed.global_batch and self.train.gradient_accumulation > 1),
            "train.gradient_accumulation",
            self.train.gradient_accumulation,
            "it follows from distributed.global_batch; leave it out",
        )
        self.placement.check_window(self.data.window)
        if self.model.quantization != "none":
            self._check_quantized()
        split = self.train.optimizer == "adamw_split"
        low_precision = self.model.dtype in ("bfloat16", "float16")
        _require(
            not (low_precision and self.lora.rank == 0 and not split),
            "model.dtype",
            self.model.dtype,
            "full fine-tuning loses small updates to rounding in 16-bit weights; use float32 (arithmetic stays "
            "train.precision), bfloat16 with train.optimizer = adamw_split, or train adapters with lora.rank",
        )
        if split:
            self._check_split()
        _require(
            not self.train.distill or self.distributed.strategy in ("none", "ddp"),
            "train.distill",
            self.train.distill,
            f"keeps a whole copy of the base in each process; distributed.strategy = {self.distributed.strategy} "
            "shards what would not fit: use strategy ddp, or train.distill = 0",
        )

    def _check_quantized(self) -> None:
        name, value = "model.quantization", self.model.quantization
        _require(self.lora.rank > 0, name, value, "4-bit weights cannot be trained: set lora.rank, such as 16")
        _require(
            self.model.dtype == "bfloat16",
            name,
            value,
            f"what stays whole (embeddings, norms, output) is of model.dtype = {self.model.dtype}: use bfloat16",
        )
        _require(not self.model.name.endswith(".gguf"), name, value, "a GGUF file has a quantization of its own")
        _require(
            not self.train.distill, name, value, "a teacher would be a second base in memory: use train.distill = 0"
        )
        _require(
            self.distributed.strategy in ("none", "ddp"),
            name,
            value,
            f"distributed.strategy = {self.distributed.strategy} cannot shard 4-bit weights: use ddp",
        )

    def _check_split(self) -> None:
        name, value = "train.optimizer", self.train.optimizer
        _require(self.model.dtype == "bfloat16", name, value, f"needs model.dtype = bfloat16, not {self.model.dtype}")
        _require(self.train.precision == "bfloat16", name, value, "needs train.precision = bfloat16")
        _require(self.lora.rank == 0, name, value, "adapters are float32 already: use adamw with lora.rank")
        _require(
            self.distributed.strategy in ("none", "ddp"),
            name,
            value,
            f"distributed.strategy = {self.distributed.strategy} keeps float32 masters itself: use adamw",
        )
        _require(
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
