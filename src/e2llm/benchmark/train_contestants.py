"""Who is measured: names of trainers, what each is given, and one measured run as plain values.

Flows in: names, sizes, settings. Flows out: `Contestant`s and the recipe that one of ours trains by. Loads no torch:
the process that starts contestants must not hold memory of the GPU.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2llm.benchmark.shapes import shape_of

LITGPT = "litgpt"
FULL_LENGTH = "full-length"
PLAIN_POSITIONS = "e2llm-plain-positions"
FAR_KEYS = "e2llm-far-keys"
LIGER_COMPILE: dict[str, dict[str, bool]] = {
    "hf-liger-compile": {},
    "hf-liger-compile-own-loss": {"fused_linear_cross_entropy": False},
    "hf-liger-compile-own-rope": {"rope": False},
    "hf-liger-compile-loss-only": {"rope": False, "rms_norm": False, "swiglu": False},
}
"""Trainer -> Liger kernels that it goes without. With all of them and torch.compile, torch 2.11 and Liger 0.8 end in an
illegal memory access; a peer's own best settings are the fastest of those that run."""
HF_OPTIONS: dict[str, dict[str, Any]] = {
    "hf": {},
    "hf-compile": {"torch_compile": True},
    "hf-liger": {"use_liger_kernel": True},
    **{
        name: {"torch_compile": True, "use_liger_kernel": True, "liger_kernel_config": left_out or None}
        for name, left_out in LIGER_COMPILE.items()
    },
}
"""Trainer -> what transformers' TrainingArguments are given beyond bf16 and the batch; all else is theirs."""
UNSLOTH_OPTIONS: dict[str, dict[str, Any]] = {"unsloth": {}, "unsloth-float32": {"float32_mixed_precision": True}}
"""Trainer -> what unsloth's loader is given beyond its documentation's arguments. In full fine-tuning `unsloth` holds
weights and the optimizer's state in bfloat16, as it does unless told otherwise; `unsloth-float32` in float32, as all
others here."""
_NO_WEIGHTS = ("scales.values=[]", "scales.weights=[]", "scales.final_weights=[]")
_ONE_PIECE = ("placement.kind=none", "placement.native_kind=same", "placement.far_weight=0")
POSITIONS: dict[str, tuple[str, ...]] = {
    "e2llm": ("placement.far_weight=0",),
    FAR_KEYS: (),
    PLAIN_POSITIONS: (
        *("scales.distribution=fixed", "scales.max_scale=1", *_NO_WEIGHTS),
        *_ONE_PIECE,
    ),
    FULL_LENGTH: (
        *("scales.distribution=fixed", "scales.max_scale={scale:g}", *_NO_WEIGHTS),
        *_ONE_PIECE,
    ),
}
"""Trainer of ours -> changes of the recommended recipe. e2llm: random scales and positions through the attention that
the peers have, so that the trainers are compared and not the recipes. full-length: YaRN at the fixed scale window /
native window; far keys: those that count for others, as the recipe has them, which makes heads wider."""
TRAINERS = (*POSITIONS, *HF_OPTIONS, LITGPT, *UNSLOTH_OPTIONS)
DEFAULT_TRAINERS = ("e2llm", PLAIN_POSITIONS, "hf", "hf-compile", "hf-liger", "hf-liger-compile")
PACKAGES = {
    **dict.fromkeys(("hf-liger", *LIGER_COMPILE), "liger-kernel"),
    LITGPT: "litgpt",
    **dict.fromkeys(UNSLOTH_OPTIONS, "unsloth"),
}
"""Trainer -> the optional package that it needs."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One training run that is measured. All that a process needs to know."""

    trainer: str
    shape: str
    window: int
    """R in tokens."""
    batch_size: int
    """Windows in a step of each GPU."""
    steps: int
    """Steps that are counted, after `warmup` that are not."""
    warmup: int
    block: int = 5
    """Steps of one figure."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    method: str = "yarn"
    settings: tuple[str, ...] = ()
    """key=value, for the recipe of our own trainers."""
    profile: int = 0
    """Steps under the profiler, after the counted ones."""
    gpus: int = 1
    """Processes, a GPU each (on a machine without GPUs: processes)."""
    parallelism: str = "none"
    """The recipe's distributed.strategy: none, ddp, fsdp2 …"""

    @property
    def name(self) -> str:
        """Unique among contestants of one shape."""
        extra = " checkpointing" * self.checkpointing
        if self.gpus > 1:
            extra += f" on {self.gpus} by {self.parallelism}"
        return f"{self.trainer} {self.batch_size} x {self.window}{extra}"


def recipe_of(one: Contestant, text: Path, work: Path) -> Any:
    """The recommended recipe at its fastest, with the contestant's changes. ValueError for settings it refuses."""
    from e2llm.config import load_recipe

    shape = shape_of(one.shape)
    lora = [f"lora.rank={shape.lora_rank}", "model.dtype=bfloat16", f"model.quantization={shape.quantization}"]
    scale = max(1.0, one.window / shape.native_window)
    return load_recipe(
        "recommended",
        [
            f"method={one.method}",
            f"model.name={one.shape}",
            f'data.sources=[{{path="{text}"}}]',
            f"data.window={one.window}",
            f"data.cache_dir={work / 'tokens'}",
            "data.held_out_fraction=0",
            f"train.steps={one.warmup + one.steps + one.profile + 1}",  # never the last step: that one saves
            f"train.batch_size={one.batch_size}",
            f"train.gradient_checkpointing={str(one.checkpointing).lower()}",
            "train.compile=layers",
            "train.evaluate_windows=0",
            f"output={work / 'run'}",
            f"distributed.strategy={one.parallelism}",
            *(lora if shape.lora_rank else ()),
            *(setting.format(scale=scale) for setting in POSITIONS.get(one.trainer, ())),
            *one.settings,
        ],
    )


def require_package(trainer: str) -> None:
    """ModuleNotFoundError with the install line where the trainer's optional package is not there."""
    package = PACKAGES.get(trainer)
    if package is None:
        return
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"trainer = {trainer!r} needs a package: pip install {package}") from error
