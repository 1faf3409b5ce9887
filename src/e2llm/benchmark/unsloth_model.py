"""unsloth's models as they are trained: what its loader and its adapters are given, and the folder they are read from.

Flows in: a `Contestant`, a work folder. Flows out: the model that unsloth made fit for training, and the settings it
was given as plain values. Knows no trainer and no windows. The arguments are those of unsloth's own documentation for
16-bit adapters and for full fine-tuning. Importing this file loads neither torch nor unsloth.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from e2llm.benchmark.model_folder import model_folder
from e2llm.benchmark.shapes import shape_of
from e2llm.benchmark.train_contestants import UNSLOTH_OPTIONS, Contestant

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama but the output layer: where our own adapters are."""


def import_unsloth(work: Path) -> None:
    """Import unsloth, which has to come before transformers: it replaces parts of it. Changes this process for good."""
    os.environ |= {
        # It downloads a file from the hub at every load to count its users; there may be no network to wait for.
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # The code that it generates, by default in whatever directory this process was started in. Gone after the run:
        # nobody trains what another version or shape has left there.
        "UNSLOTH_COMPILE_LOCATION": str(work / "run" / "unsloth"),
    }
    import unsloth  # noqa: F401


def load_arguments(one: Contestant) -> dict[str, Any]:
    """What FastLanguageModel.from_pretrained is given beside the folder and bfloat16. ValueError for adapters in
    float32, which it has not."""
    shape, options = shape_of(one.shape), UNSLOTH_OPTIONS[one.trainer]
    if shape.lora_rank and options:
        raise ValueError(f"trainer = {one.trainer!r}: full fine-tuning only, and {one.shape} has adapters; use unsloth")
    return {
        "max_seq_length": one.window,
        "load_in_4bit": False,
        "full_finetuning": not shape.lora_rank,
        "use_gradient_checkpointing": _checkpointing(one),
        **options,
    }


def adapter_arguments(one: Contestant) -> dict[str, Any]:
    """What FastLanguageModel.get_peft_model is given: our own adapters, without dropout and biases, which it fuses."""
    from e2llm.config_sections import LoraSection

    lora = LoraSection(rank=shape_of(one.shape).lora_rank)
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
        "use_gradient_checkpointing": _checkpointing(one),
    }


def precision(one: Contestant) -> dict[str, Any]:
    """What the trainer's arguments say of precision. bfloat16 weights alone need no autocast: its own trainer, too,
    switches it off for them."""
    return {"bf16": bool(shape_of(one.shape).lora_rank or UNSLOTH_OPTIONS[one.trainer])}


def _checkpointing(one: Contestant) -> str | bool:
    return "unsloth" if one.checkpointing else False


def unsloth_model(one: Contestant, work: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The model, on the GPU where there is one, and what it was made with. `import_unsloth` came first."""
    import torch
    from unsloth import FastLanguageModel

    loading = load_arguments(one)
    folder = model_folder(shape_of(one.shape), work, tokenizer)
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.bfloat16, **loading)
    settings = {"version": importlib.metadata.version("unsloth"), "dtype": "bfloat16", **loading}
    if shape_of(one.shape).lora_rank:
        adapters = adapter_arguments(one)
        model = FastLanguageModel.get_peft_model(model, **adapters)
        settings["adapters"] = adapters
    return model, settings
