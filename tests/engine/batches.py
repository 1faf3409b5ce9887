"""Engines over tiny random models, batches of requests, and the texts that transformers' static scaling gives alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import WINDOW, statically_scaled, tiny_model, token_ids

import e2llm
from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import FinishReason, Request, Sampling, Stream, TokenLogprob
from e2llm.hf import install

BASE = str(Path(e2llm.__file__).parent / "assets" / "tiny-512")
MAX_SCALE = 8.0
STATIC: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear"},
    "yarn": {"rope_type": "yarn", "original_max_position_embeddings": WINDOW},
}
NO_END = {"eos_token_id": None}


@dataclass(frozen=True)
class Answer:
    """All outputs of a stream, put together."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...]
    error: str | None


def collect(stream: Stream) -> Answer:
    outputs = list(stream)
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    return Answer(
        tuple(token for o in outputs for token in o.token_ids),
        "".join(o.text for o in outputs),
        outputs[-1].finish_reason,
        tuple(one for o in outputs for one in o.logprobs),
        outputs[-1].error,
    )


def run(engine: BatchEngine, requests: Sequence[Request]) -> list[Answer]:
    """All requests at once, answers in their order."""
    return [collect(stream) for stream in [engine.submit(request) for request in requests]]


def tiny_engine(model_type: str = "llama", method: str = "yarn", **options: Any) -> BatchEngine:
    """float32, native window 64, no end token, no tokenizer unless one is given."""
    model = tiny_model(model_type, **NO_END)
    model.generation_config.eos_token_id = None
    install(model, method=method)
    tokenizer = options.pop("tokenizer", None)
    return BatchEngine(model, tokenizer, **({"max_scale": MAX_SCALE} | options))


def prompt(tokens: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(token_ids(1, tokens, seed)[0].tolist())


def mixed_requests() -> list[Request]:
    """27 requests at scales 1, 2, 3, 4 and 8: lengths around page and window bounds, shared beginnings, repeats."""
    lengths = [1, 5, 15, 16, 17, 31, 50, 56, 57, 64, 65, 90, 120, 128, 129, 200, 240, 250, 300, 470]
    requests = [Request(prompt_ids=prompt(n, seed=n), max_new_tokens=6 + n % 5) for n in lengths]
    requests += [Request(prompt_ids=prompt(n, seed=3), max_new_tokens=8, scale=3.0) for n in (20, 100, 180)]
    requests += [Request(prompt_ids=prompt(100, seed=120)[:80] + prompt(30, seed=n), max_new_tokens=8) for n in (8, 9)]
    return [*requests, requests[12], requests[3]]


@functools.cache
def static_tokens(model_type: str, method: str, scale: float, prompt_ids: tuple[int, ...], new: int) -> tuple[int, ...]:
    """What transformers' own generate() says on its own statically scaled model, alone."""
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        model = static_model(model_type, method, scale)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
    return tuple(found[0, len(prompt_ids) :].tolist())


@functools.cache
def static_model(model_type: str, method: str, scale: float) -> Any:
    model: Any = tiny_model(model_type, **NO_END)
    if scale > 1:
        model = statically_scaled(model, factor=scale, **STATIC[method])
    model.generation_config.eos_token_id = None
    return model


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The same weights rounded to `dtype`; the rotary tables stay float32, as from_pretrained leaves them."""
    from transformers import AutoModelForCausalLM

    rounded: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype).eval()
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config.eos_token_id = None
    return rounded


def expected_tokens(model_type: str, method: str, request: Request, scale: float) -> tuple[int, ...]:
    assert request.max_new_tokens is not None
    return static_tokens(model_type, method, scale, request.prompt_ids, request.max_new_tokens)


GREEDY_ON = Sampling(ignore_eos=True)
