"""What one evaluation measures, as plain data. No torch; every default of `e2llm evaluate` lives here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
"""RULER's thirteen kinds (arXiv 2404.06654)."""
LOSSES = ("whole", "sliding", "position", "difference", "key_tokens")
"""Protocols that read and ask nothing."""
PROTOCOLS = (*LOSSES, "pass_key", "uuid_kv", "needle", "multi_needle", "kv_pairs", "attention", *RULER)

METHODS = ("none", "linear", "ntk", "dynamic_ntk", "yarn", "longrope", "self_extend")
"""What a checkpoint may be read with: a frequency method, or the attention of SelfExtend."""

WHOLE_TEXT = (0.0, 1.0)
"""Depths of the whole text, as shares of it: 0 at its beginning, 1 at its end."""


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
    else max(1, window / native window), and windows above the trained range are refused."""
    method: str | None = None
    """Frequency method (none, linear, ntk, dynamic_ntk, yarn, longrope, self_extend); None: the checkpoint's own."""
    protocols: tuple[str, ...] = ("whole", "pass_key")
    """whole: windows in one pass; sliding: the paper's, stride 256; position: loss by position in the window;
    difference: whole over sliding on the same tokens; key_tokens: perplexity on tokens that need the context; pass_key,
    uuid_kv: retrieval by depth and length (five digits; one of three UUID pairs); needle, multi_needle: maps of length
    × depth; kv_pairs: a JSON object of UUIDs; attention: where the answer looks; niah_… to qa_2: RULER."""
    stride: int = 256
    """Tokens that one step of the sliding window scores."""
    max_strides: int | None = 64
    """Steps a document of the sliding window; None scores the whole document (one forward pass per `stride` tokens).
    64 at stride 256 is the paper's protocol: all of a document of 16k tokens, 16,384 tokens of a longer one."""
    prompts: int = 20
    """Retrieval prompts per window, scale and task."""
    depths: tuple[float, float] = WHOLE_TEXT
    """pass_key, uuid_kv: part of the text in which the asked fact stands, from and to, as shares of it."""
    batch_size: int = 1
    """Questions of one window asked at once, through the serving engine (attention is always watched one by one)."""
    qa: Mapping[str, str] = field(default_factory=dict)
    """qa_1, qa_2 -> file of questions with their documents (SQuAD's or HotpotQA's JSON, or JSONL)."""
    left_out: tuple[str, ...] = ()
    """Protocols of a suite that are not asked, for want of a file."""
    kv_files: tuple[str, ...] = ()
    """Lost-in-the-Middle files for kv_pairs; empty: objects are made that fill the window."""
    key_model: str = ""
    """Model that says which tokens need the context (key_tokens); empty: the measured one itself."""
    neighbours: int | None = None
    """method self_extend: tokens read at their own distance; None: a quarter of the native window."""
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
    compile: Literal["none", "layers"] = "none"
    """layers: torch.compile decoder layers while losses are measured; half a minute first, then faster on a GPU. A
    figure may differ by a rounding."""
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
        least_of = {"stride": 1, "max_strides": 1, "prompts": 1, "batch_size": 1, "max_documents": 1, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: use at least {least}")
        strange = sorted(set(self.qa) - {"qa_1", "qa_2"})
        if strange:
            raise ValueError(f"qa = {strange}: name qa_1 or qa_2, e.g. qa_1=squad.json")
        self._check_read()
        self._check_depths()
        check_neighbours_named(self.method, self.neighbours)
        if self.compile not in ("none", "layers"):
            raise ValueError(f"compile = {self.compile!r}: use 'none' or 'layers'")
        if not self.out:
            raise ValueError("out = '': name the Record file to write")

    def _check_read(self) -> None:
        """Raise for files that no protocol asked for reads: they were named for something."""
        unread = {f"qa = {name}": name for name in self.qa} | {
            name: protocol
            for name, protocol in (("kv_files", "kv_pairs"), ("key_model", "key_tokens"))
            if getattr(self, name)
        }
        for name, protocol in unread.items():
            if protocol not in self.protocols:
                raise ValueError(f"{name}: {protocol} alone reads it; add it to protocols, or leave it out")

    def _check_depths(self) -> None:
        low, high = self.depths
        if not 0 <= low < high <= 1:
            raise ValueError(f"depths = {list(self.depths)}: use two shares of the text, smaller one first")
        if self.depths != WHOLE_TEXT and not {"pass_key", "uuid_kv"} & set(self.protocols):
            raise ValueError("depths: pass_key and uuid_kv alone read it; add one to protocols, or leave it out")


def depths_label(depths: tuple[float, float]) -> str:
    """A part of the text as rows name it; "" for the whole."""
    return "" if depths == WHOLE_TEXT else f"{depths[0]:g} to {depths[1]:g}"


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


def check_neighbours_named(method: str | None, neighbours: int | None) -> None:
    """Raise for `neighbours` that the method does not have."""
    if neighbours is not None and (neighbours < 1 or method != "self_extend"):
        raise ValueError(f"neighbours = {neighbours}: at least 1, and with method = 'self_extend' only")
