"""What is fixed when vLLM takes a request: its scale, its length, the salt of its prefix cache.

Flows in: a `Scaling`, lengths, what the caller asked for. Flows out: a `RequestPlan`, chosen by the same function as in
e2llm's own engine, or a refusal. Knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from e2llm.engine.planning import plan_trained
from e2llm.engine.request import RefusedError
from e2llm.infer import RequestPlan
from e2llm.vllm_plugin.scaling import Scaling

SCALE_KEY = "e2llm_scale"
"""In `SamplingParams.extra_args` (`vllm_xargs` over HTTP): the scale that the caller wants; then the one it has."""
BEYOND_KEY = "e2llm_beyond_trained"
"""Likewise: serve a request that is longer than the largest trained window."""


@dataclass(frozen=True)
class Wish:
    """What a caller asked for."""

    scale: float | None = None
    beyond_trained: bool = False


def read_wish(extra_args: Mapping[str, Any] | None) -> Wish:
    """From a request's extra arguments. Raises ValueError naming the one that cannot be."""
    given = extra_args or {}
    scale, beyond = given.get(SCALE_KEY), given.get(BEYOND_KEY, False)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ValueError(f"{SCALE_KEY} = {scale!r}: use a number of at least 1, or leave it out")
    if beyond not in (True, False, 0, 1):
        raise ValueError(f"{BEYOND_KEY} = {beyond!r}: use true or false")
    return Wish(None if scale is None else float(scale), bool(beyond))


def admit(
    scaling: Scaling, prompt_tokens: int, max_new_tokens: int | None, wish: Wish, max_model_len: int
) -> RequestPlan:
    """Scale, window and length of a request. `max_model_len`: vLLM's own limit, tokens.

    Raises RefusedError (a ValueError) for a scale without a table, a request longer than the largest trained window
    (unless asked for) or than its scale's table, ValueError for what makes no sense.
    """
    plan = plan_trained(
        prompt_tokens,
        native_window=scaling.native_window,
        max_scale=scaling.max_scale,
        schedule=scaling.schedule,
        max_new_tokens=max_new_tokens,
        scale=wish.scale,
        beyond_trained=wish.beyond_trained,
    )
    total = prompt_tokens + plan.max_new_tokens
    asked = f"prompt ({prompt_tokens}) + new tokens ({plan.max_new_tokens}) = {total} tokens"
    longest = min(scaling.max_window, max_model_len)
    if total > longest:
        raise RefusedError(
            f"{asked}: this engine was started for {longest} tokens; shorten the request, or start it with a larger "
            "e2llm.max_window"
        )
    if plan.scale not in scaling.row_starts:
        raise RefusedError(
            f"scale = {plan.scale:g}: this engine has tables for {', '.join(f'{s:g}' for s in scaling.scales)}; ask "
            "for one of them, or start it with e2llm.scales"
        )
    if total > scaling.rows(plan.scale):
        raise RefusedError(
            f"{asked}: the window of scale {plan.scale:g} is {scaling.window(plan.scale)} tokens; ask for a larger "
            "scale, or leave it out"
        )
    return plan


def cache_salt(scale: float, own: str | None) -> str:
    """Salt of the prefix cache: keys of different scales are never shared, nor those that the caller keeps apart."""
    return f"e2llm-scale={scale!r}" + ("" if own is None else f";{own}")
