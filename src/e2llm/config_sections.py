"""Sections of a recipe that concern the model, the data and the trainer, as frozen dataclasses.

Flows in: plain values. Flows out: one object a section, or a ValueError that names the key. What concerns two sections
at once is the recipe's to check (`config.Recipe`). Knows no torch and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16", "auto"]


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    """ValueError naming the key, its value and the remedy, unless `condition` holds."""
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
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the frozen matrices of the decoder layers wait under adapters: none, on the GPU; cpu, in host memory; disk,
    in files of the run folder that are removed at the end. Each is fetched twice a batch: slow, for bases that do not
    fit otherwise."""
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
    planted: float | None = None
    """data.planted of this source alone."""
    planted_sets: int | None = None
    """data.planted_sets of this source alone."""

    def __post_init__(self) -> None:
        one = bool(self.path) != bool(self.synthetic)
        require(one, "data.sources.path", self.path, "give path or synthetic, not both")
        _check_planted("data.sources", self.planted, self.planted_sets)
        plain = not (self.planted and self.synthetic)
        require(plain, "data.sources.planted", self.planted, "facts are planted in text of a path; leave it out here")
        require(self.weight > 0, "data.sources.weight", self.weight, "a weight is above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Ordinary short text, packed into windows."""

    sources: tuple[SourceConfig, ...] = ()
    window: int = 4096
    """R, tokens in a training window."""
    document_mask: bool = False
    """Keep packed documents apart: position ids restart at each, and attention does not cross."""
    pieces: Literal["row", "document", "documents"] = "row"
    """Where positions jump in a window: row, text goes on in a row, so that what is next stands far away; document,
    text jumps too, to what stands that far on in the document (nearer where it is too short); documents, to any other.
    Windows with planted facts stay in a row."""
    planted: float = 0.0
    """Share of the windows of plain text in which made-up facts are stated and asked for again (`data.planted`). Chats,
    and sources that are made up themselves, stay as they are."""
    planted_sets: int = 4
    """Most sets of such facts in one window, each of up to 14 names; as many as are drawn from 1 to this, or as fit."""
    planted_weight: float = 1.0
    """How much the first three tokens of an answer to such a fact count in the loss: they are the choice among the
    values that were stated, what follows is copied. Above 1 teaches the choice with less planted text; without facts
    there is nothing to weigh."""
    planted_loss: Literal["all", "answers"] = "all"
    """What carries loss in the lines of such facts: all, or answers alone (with what ends their lines), which costs
    text a little less and finds fewer keys."""
    held_out_fraction: float = 0.01
    """Share of documents, per source, kept for the evaluation loss. At least one document where a source has two."""
    seed: int = 0
    """Seed of the window order and of the held-out choice."""
    cache_dir: str = ".e2llm-cache"
    """Folder of the token cache."""

    def __post_init__(self) -> None:
        require(self.window >= 8, "data.window", self.window, "use at least 8 tokens")
        require(0 <= self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "use 0 to below 1")
        _check_planted("data", self.planted, self.planted_sets)
        require(self.planted_weight > 0, "data.planted_weight", self.planted_weight, "use a number above 0")

    @property
    def weighs_tokens(self) -> bool:
        """Whether some tokens may count for more in the loss: facts are planted, and `planted_weight` is not 1."""
        shares = [self.planted if source.planted is None else source.planted for source in self.sources]
        return self.planted_weight != 1 and any(shares or [self.planted])


def _check_planted(section: str, share: float | None, sets: int | None) -> None:
    require(share is None or 0 <= share <= 1, f"{section}.planted", share, "use a share between 0 and 1")
    require(sets is None or sets >= 1, f"{section}.planted_sets", sets, "use at least 1")


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
        require(self.rank >= 0, "lora.rank", self.rank, "use 0 (full fine-tuning) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "use a number above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "use 0 to below 1")
        extras = self.train_embeddings or self.train_norms
        require(self.rank > 0 or not extras, "lora.train_embeddings", extras, "without lora.rank all is trained")


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
    interpolation: float = 1.0
    """Where the saved weights lie on the straight line from the base's (0) to the trained ones (1). Below 1 short
    windows get back most of what training took from them, and long ones lose little (WiSE-FT, Wortsman et al. 2022).
    The checkpoints to resume from and the held-out losses are those of the trained weights."""
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
    check_memory: bool = True
    """Refuse, before weights are read, a run that by `e2llm plan`'s count does not fit the GPU; false warns and goes
    on."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "use at least 1")
        counts = ("warmup_steps", "evaluate_every", "evaluate_windows", "save_every", "workers", "logits_tokens")
        for name in (*counts, "max_grad_norm"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "use 0 or more")
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "use a number above 0")
        require(0 <= self.distill <= 1, "train.distill", self.distill, "use a share from 0 to 1")
        require(
            not self.distill or self.logits_tokens > 0,
            "train.distill",
            self.distill,
            "is computed with the loss in pieces: set train.logits_tokens above 0, such as 8192",
        )
        require(
            0 < self.interpolation <= 1,
            "train.interpolation",
            self.interpolation,
            "use a share above 0 (the base's weights), to 1 (the trained ones)",
        )
        require(len(self.betas) == 2, "train.betas", self.betas, "AdamW has two betas")
        require(self.keep_checkpoints >= 2, "train.keep_checkpoints", self.keep_checkpoints, "use at least 2")
        require(all(s >= 1 for s in self.evaluate_scales), "train.evaluate_scales", self.evaluate_scales, "use >= 1")
