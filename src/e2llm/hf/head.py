"""The step from hidden states to logits, found by trying: who makes logits piece by piece needs it apart.

Flows in: a causal LM. Flows out: a function of hidden states. A causal LM is a body, an output layer and, in some
families, one more step (Gemma caps the logits, Granite divides them, Cohere multiplies them). The steps known here are
tried on a short sequence, and the one that gives the model's own logits is used. N = tokens, H = hidden size,
V = vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from e2llm.hf.compiled import uncompiled
from e2llm.hf.rotary import unwrap

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (N, H) -> logits (N, V)."""


class FullLogitsWarning(UserWarning):
    """The model's output step is unknown: logits of all tokens are held."""


def _candidates(model: Any, project: Head) -> Iterator[Head]:
    """The output layer alone and followed by each step that the config suggests."""
    config = model.config.get_text_config()
    yield project
    for setting, steps in _STEPS.items():
        value = getattr(config, setting, None)
        if value:
            yield from (partial(step, project, float(value)) for step in steps)


def _capped(project: Head, cap: float, hidden: torch.Tensor) -> torch.Tensor:
    return cap * torch.tanh(project(hidden) / cap)


def _divided(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden) / ratio


def _multiplied(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden) * ratio


def _divided_before(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden / ratio)


_STEPS = {
    "final_logit_softcapping": (_capped,),  # Gemma 2 and later, nanochat
    "logits_scaling": (_divided, _multiplied, _divided_before),  # Granite; HyperCLOVA X; MiniCPM3
    "logit_scale": (_multiplied,),  # Cohere
    "lm_head_multiplier": (_multiplied,),  # Falcon-H1
}
"""Setting of a model's config -> what its families do with it."""


@torch.no_grad()
def find_head(model: Any, project: Head | None = None, *, from_first: bool = False) -> Head | None:
    """The output step of `model`, checked on 8 tokens; None (with a warning) when it is none of those known here.

    project: what the step calls as its output layer; None: the layer itself, hooks included. from_first: the first
    process of the group checks, the others, which may hold no weights, take its answer; a meeting of all.
    """
    model = unwrap(model)
    candidates = list(_candidates(model, project or model.get_output_embeddings()))
    with uncompiled():
        if not from_first:
            found = _checked(model, candidates)
        else:
            box = [_checked(model, candidates) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
            found = box[0]
    return None if found is None else candidates[found]


def _checked(model: Any, candidates: list[Head]) -> int | None:
    """Number of the candidate that gives the model's own logits."""
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    # One rounding of the model's own type apart at most: some models cast before and some after the output layer.
    tolerance = 4 * torch.finfo(hidden.dtype).eps * max(1.0, float(expected.abs().max()))
    best: tuple[float, int | None] = (math.inf, None)
    for number, head in enumerate(candidates):
        logits = head(hidden).float()
        if logits.shape == expected.shape:
            error = float((logits - expected).abs().max())
            best = min(best, (error, number), key=lambda found: found[0])
    if best[0] <= tolerance:
        return best[1]
    vocabulary = expected.shape[-1]
    mebibytes = vocabulary * 6 / 2**20  # the model's own type and a float32 copy
    warnings.warn(
        f"{model.config.model_type}: the step from hidden states to logits is not a known one, so logits of all tokens "
        f"are held: {mebibytes:.2f} MiB per token of the window ({mebibytes * 32:.0f} GiB at 32768)",
        FullLogitsWarning,
        stacklevel=3,
    )
    return None
