"""Random checkpoints in float32 behind the engine, and what transformers' own static scaling says of them alone."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from architectures import WINDOW, statically_scaled, tiny_model
from checkpoints import checkpoint_info, save_checkpoint

from e2llm.engine.request import FinishReason, Request, Sampling, Stream, TokenLogprob
from e2llm.llamacpp import LlamaCppEngine

VOCABULARY = 4096
MAX_SCALE = 8.0
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": None}
GREEDY_ON = Sampling(ignore_eos=True)


def make_checkpoint(folder: Path, model_type: str, method: str, slope: float | None = None, **fields: Any) -> str:
    attention = {} if slope is None else {"training_slope": 0.0, "slope": slope}
    info = checkpoint_info(method, attention=attention, **fields)
    return save_checkpoint(folder, model_type, bpe=True, info=info, **SIZES)[0]


def engine_over(checkpoint: str, **options: Any) -> LlamaCppEngine:
    """float32 throughout; memory for several scales at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LlamaCppEngine.load(
            checkpoint, dtype="float32", tell=lambda line: None, **({"kv_tokens": 8192, "threads": 1} | options)
        )


def prompt(tokens: int, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist())


def collect(stream: Stream) -> tuple[tuple[int, ...], FinishReason | None, tuple[TokenLogprob, ...], str | None]:
    outputs = list(stream)
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    tokens = tuple(token for o in outputs for token in o.token_ids)
    return tokens, outputs[-1].finish_reason, tuple(one for o in outputs for one in o.logprobs), outputs[-1].error


def static_scaling(method: str, scale: float, slope: float | None) -> dict[str, Any]:
    """The scale in the words of a transformers config, written here from its documentation."""
    if scale == 1:
        return {}
    if method == "linear":
        return {"rope_type": "linear", "factor": scale}
    if method == "ntk":
        return {"rope_theta": 10000.0 * scale ** (16 / 14)}
    attention = {} if slope is None else {"attention_factor": 1 + slope * math.log(scale)}
    return {"rope_type": "yarn", "factor": scale, "original_max_position_embeddings": WINDOW, **attention}


@functools.cache
def static_model(model_type: str, method: str, scale: float, slope: float | None) -> Any:
    model = statically_scaled(tiny_model(model_type, **SIZES), **static_scaling(method, scale, slope))
    model.generation_config.eos_token_id = None
    return model


def static_tokens(model: Any, request: Request) -> tuple[int, ...]:
    """What transformers' generate() says to the request, alone."""
    ids = torch.tensor([request.prompt_ids])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.max_new_tokens
        )
    return tuple(found[0, ids.shape[1] :].tolist())
