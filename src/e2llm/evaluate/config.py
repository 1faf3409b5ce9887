"""What one evaluation measures, as plain data. No torch; every default of `e2llm evaluate` lives here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

PROTOCOLS = ("whole", "sliding", "pass_key", "uuid_kv")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation: a model, texts, windows and scales."""

    model: str = ""
    """Checkpoint folder, hub name or .gguf file."""
    corpora: Mapping[str, str] = field(default_factory=dict)
    """Label (mathematics, novels, …) -> file or folder of text; the labels stay apart in the results."""
    windows: tuple[int, ...] = (4096, 8192)
    """Windows in tokens, each a divisor of the largest and a multiple of the smallest: the same tokens are scored at
    each."""
    scales: tuple[float, ...] = ()
    """Scales measured at every window (a full grid); empty: one per window, the checkpoint's calibrated one,
    else max(1, window / native window)."""
    method: str | None = None
    """Frequency method (none, linear, ntk, yarn, longrope); None: the checkpoint's own."""
    protocols: tuple[str, ...] = ("whole", "pass_key")
    """whole: windows in one pass; sliding: the paper's, stride 256; pass_key, uuid_kv: retrieval by depth and length
    (five digits; one of three UUID pairs)."""
    stride: int = 256
    """Tokens that one step of the sliding window scores."""
    max_strides: int | None = 16
    """Steps a document of the sliding window; None scores the whole document (one forward pass per `stride` tokens)."""
    prompts: int = 20
    """Retrieval prompts per window, scale and task."""
    chat: bool = False
    """Put retrieval prompts in the tokenizer's chat template."""
    max_documents: int | None = None
    """Documents used per corpus, the first by name; None uses every document that reaches the largest window."""
    seed: int = 0
    """Seed of the retrieval prompts (value, depth, place of the filler)."""
    dtype: str | None = None
    """float32, bfloat16 or auto; None: bfloat16 on a GPU, float32 on a CPU."""
    device: str | None = None
    """cuda, cuda:1, cpu …; None: the GPU where there is one."""
    attn_implementation: str | None = None
    """transformers' attention backend; None lets transformers choose."""
    checkpoint: str = ""
    """Label of the weights (base, plain, paper, recommended, …); empty: the model's folder name."""
    base_model: str = ""
    """Label of the base model; empty: what the checkpoint says, else the model's folder name."""
    out: str = "evaluation.json"
    """Record written at the end; `OUT.partial.jsonl` holds finished parts while it runs."""

    def __post_init__(self) -> None:
        check_windows(self.windows)
        check_scales(self.scales)
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown or not self.protocols:
            raise ValueError(f"protocols = {list(self.protocols)}: choose from {', '.join(PROTOCOLS)}")
        for name, least in (("stride", 1), ("max_strides", 1), ("prompts", 1), ("max_documents", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: use at least {least}")
        if not self.out:
            raise ValueError("out = '': name the Record file to write")


def check_windows(windows: tuple[int, ...]) -> None:
    """Raise unless every window cuts the largest evenly and is cut evenly by the smallest."""
    if not windows or min(windows) < 8:
        raise ValueError(f"windows = {list(windows)}: give one or more windows of at least 8 tokens")
    if len(set(windows)) != len(windows):
        raise ValueError(f"windows = {list(windows)}: each window once")
    for window in windows:
        if max(windows) % window or window % min(windows):
            raise ValueError(
                f"windows = {list(windows)}: {window} is not a multiple of the smallest ({min(windows)}) and a "
                f"divisor of the largest ({max(windows)}), so the same tokens cannot be scored at each; "
                "use for example powers of two"
            )


def check_scales(scales: tuple[float, ...]) -> None:
    """Raise unless every scale is a finite number of at least 1, given once."""
    if any(not math.isfinite(scale) or scale < 1 for scale in scales) or len(set(scales)) != len(scales):
        raise ValueError(
            f"scales = {list(scales)}: use numbers of at least 1, each once; empty means window / native window"
        )
