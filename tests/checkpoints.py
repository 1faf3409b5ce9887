"""Tiny checkpoints on disk for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from architectures import WINDOW, tiny_model
from texts import character_tokenizer

import e2llm
from e2llm.hf import CheckpointInfo, save_model

TINY_512 = Path(e2llm.__file__).parent / "assets" / "tiny-512"


def bpe_tokenizer() -> Any:
    """The embedded base's byte-level BPE, 4096 tokens, with GPT-2's cutting, which llama.cpp has."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(TINY_512))
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def checkpoint_info(method: str = "yarn", **fields: Any) -> CheckpointInfo:
    return CheckpointInfo(
        **({"method": method, "native_window": WINDOW, "training_window": 32, "max_scale": 8.0} | fields)
    )


def save_checkpoint(
    folder: Path, model_type: str = "llama", method: str = "yarn", *, bpe: bool = False, info: Any = None, **sizes: Any
) -> tuple[str, Any]:
    """(folder as the user names it, the model in it) of a random model with native window 64, trained to scale 8."""
    if bpe:
        sizes = {"vocab_size": 4096} | sizes
    model = tiny_model(model_type, **sizes)
    tokenizer = bpe_tokenizer() if bpe else character_tokenizer()
    save_model(model, tokenizer, folder, info or checkpoint_info(method))
    return str(folder), model


def plain_logits(folder: Path, ids: Any) -> Any:
    """Of the folder as anybody loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()(ids).logits
