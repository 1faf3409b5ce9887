"""Checkpoints and reference texts for the tests that run vLLM itself (marker `vllm`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.quickstart import TINY

SLOPE = 0.04
NEIGHBOURS = 100
"""No multiple of a page."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(method): the embedded base, native window 512, as if it had been trained to scale 16."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = folder = tmp_path_factory.mktemp("checkpoints") / method
            shutil.copytree(TINY, folder)
            attention = {"training_slope": 0.0, "slope": SLOPE} if method == "yarn" else {}
            info = {"method": method, "native_window": 512, "training_window": 512, "max_scale": 16.0}
            info["neighbours"] = NEIGHBOURS if method == "self_extend" else 0
            CheckpointInfo(**info, attention=attention).save(folder)  # type: ignore[arg-type]
        return made[method]

    return make


@pytest.fixture(scope="session")
def static(checkpoint: Callable[[str], Path]) -> Callable[..., list[int]]:
    """static(method, scale, prompt_ids, new_tokens): greedy tokens of transformers' own static scaling, alone."""
    import math

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models: dict[tuple[str, float], Any] = {}

    def generate(method: str, scale: float, ids: list[int], new_tokens: int) -> list[int]:
        if (method, scale) not in models:
            folder = str(checkpoint(method))
            config = AutoConfig.from_pretrained(folder)
            rope = {**config.rope_parameters, "rope_type": method, "factor": scale}
            if method == "yarn":
                rope |= {"original_max_position_embeddings": 512, "attention_factor": 1 + SLOPE * math.log(scale)}
            config.rope_parameters = rope
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
            models[method, scale] = model.eval()
        model, tokens = models[method, scale], list(ids)
        cache, step = None, torch.tensor([ids])
        with torch.no_grad():
            for _ in range(new_tokens):
                out = model(input_ids=step, past_key_values=cache, use_cache=True)
                cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens.append(int(step))
        return tokens[len(ids) :]

    return generate
