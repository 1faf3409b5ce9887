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
SELF_EXTEND = "e2llm-self-extend"
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
    SELF_EXTEND: (
        *("method=self_extend", "attention.slope=0", "attention.training_slope=0"),
        *("placement.max_jumps=7", "placement.far_weight=1"),
    ),
    PLAIN_POSITIONS: (
        *("scales.distribution=fixed", "scales.max_scale=1", *_NO_WEIGHTS),
        *_ONE_PIECE,
    ),
    FULL_LENGTH: (
        *("scales.distribution=fixed", "scales.max_scale={scale:g}", *_NO_WEIGHTS),
        *_ONE_PIECE,
    ),
}
"""Trainer of ours -> changes of the recipe `recommended-yarn`. e2llm: random scales and positions through the attention
that the peers have, so that trainers are compared and not recipes. full-length: YaRN at the fixed scale window /
native window; far keys: those that count for others, as the recipe has them, which makes heads wider; self-extend:
the recipe `recommended`, whose far keys stand in groups."""


@dataclass(frozen=True)
class Way:
    """How several GPUs share a run."""

    text: str
    """What each of them holds, in words."""
    settings: tuple[str, ...]
    """Of the recipe; {half} is half of the GPUs."""
    least: int = 2
    """GPUs that it takes at least; their number is a multiple of half of that."""
    together: int = 1
    """GPUs that compute the same windows."""
    package: str | None = None
    """That it needs beyond our own."""


_FSDP2, _ZERO = "distributed.strategy=fsdp2", "distributed.strategy=deepspeed"
_THIRD, _AWAY = "distributed.zero_stage=3", "distributed.cpu_offload=true"
PARALLELISM = {
    "ddp": Way("everything", ("distributed.strategy=ddp",)),
    "fsdp2": Way("its share of weights, gradients and optimizer", (_FSDP2,)),
    "hsdp": Way("the same, shared by half of the GPUs", (_FSDP2, "distributed.shard={half}"), least=4),
    "tensor": Way(
        "its half of each layer's work, with a neighbour; fsdp2 over the pairs",
        (_FSDP2, "distributed.tensor_parallel=2"),
        together=2,
    ),
    "fsdp2-offload": Way("as fsdp2, its share in host memory", (_FSDP2, _AWAY)),
    "deepspeed": Way("weights; its share of gradients and optimizer", (_ZERO,), package="deepspeed"),
    "zero3": Way("its share of weights, gradients and optimizer", (_ZERO, _THIRD), package="deepspeed"),
    "zero3-offload": Way("as zero3, its share in host memory", (_ZERO, _THIRD, _AWAY), package="deepspeed"),
}
"""Name -> way. deepspeed: ZeRO-2."""
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
    """none, or one of `PARALLELISM`."""

    @property
    def windows_per_step(self) -> int:
        """Of all GPUs together."""
        together = PARALLELISM[self.parallelism].together if self.gpus > 1 else 1
        return self.batch_size * (self.gpus // together)

    @property
    def name(self) -> str:
        """Unique among contestants of one shape."""
        extra = " checkpointing" * self.checkpointing
        if self.gpus > 1:
            extra += f" on {self.gpus} by {self.parallelism}"
        return f"{self.trainer} {self.batch_size} x {self.window}{extra}"


def recipe_of(one: Contestant, text: Path, work: Path) -> Any:
    """`recommended-yarn` at its fastest, with the contestant's changes. ValueError for settings it refuses."""
    from e2llm.config import load_recipe

    shape = shape_of(one.shape)
    lora = [f"lora.rank={shape.lora_rank}", "model.dtype=bfloat16", f"model.quantization={shape.quantization}"]
    scale = max(1.0, one.window / shape.native_window)
    return load_recipe(
        "recommended-yarn",
        [
            f"method={one.method}",
            f"model.name={one.shape}",
            f'data.sources=[{{path="{text}"}}]',
            "data.planted=0",  # no other trainer's text has facts
            f"data.window={one.window}",
            f"data.cache_dir={work / 'tokens'}",
            "data.held_out_fraction=0",
            f"train.steps={one.warmup + one.steps + one.profile + 1}",  # never the last step: that one saves
            f"train.batch_size={one.batch_size}",
            f"train.gradient_checkpointing={str(one.checkpointing).lower()}",
            "train.compile=layers",
            "train.evaluate_windows=0",
            f"output={work / 'run'}",
            *parallel_settings(one.parallelism, one.gpus),
            *(lora if shape.lora_rank else ()),
            *(setting.format(scale=scale) for setting in POSITIONS.get(one.trainer, ())),
            *one.settings,
        ],
    )


def parallel_settings(parallelism: str, gpus: int) -> tuple[str, ...]:
    """key=value of a recipe for `gpus` GPUs; none for one that trains alone."""
    way = PARALLELISM.get(parallelism)
    return () if way is None else tuple(setting.format(half=gpus // 2) for setting in way.settings)


def check_parallelism(parallelism: str, gpus: int) -> None:
    """Raise ValueError for a way that is none, or that so many GPUs cannot take."""
    if parallelism not in PARALLELISM:
        raise ValueError(f"parallelism = {parallelism!r}: no such way; choose from {', '.join(PARALLELISM)}")
    way = PARALLELISM[parallelism]
    multiple = max(way.least // 2, way.together)
    if gpus < way.least or gpus % multiple:
        raise ValueError(
            f"parallelism = {parallelism!r}: not for gpus = {gpus}; it takes {way.least} or more, a multiple of "
            f"{multiple}"
        )


def require_package(one: Contestant) -> None:
    """ModuleNotFoundError with the install line where the contestant's optional package is not there."""
    way = PARALLELISM.get(one.parallelism)
    for name, value, package in (
        ("trainer", one.trainer, PACKAGES.get(one.trainer)),
        ("parallelism", one.parallelism, way.package if way is not None else None),
    ):
        try:
            if package is not None:
                importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"{name} = {value!r} needs a package: pip install {package}") from error
