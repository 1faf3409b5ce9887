"""Scale, window and length of a request, and whether what was trained allows it: the same for every serving engine.

Flows in: numbers. Flows out: `infer.RequestPlan`, or a refusal. Knows no memory and no model.
"""

from __future__ import annotations

from e2llm.engine.request import RefusedError
from e2llm.infer import RequestPlan, plan_request
from e2llm.positions.choose import Policy, Schedule


def plan_trained(
    prompt_tokens: int,
    *,
    native_window: int,
    max_scale: float,
    schedule: Schedule,
    max_new_tokens: int | None,
    scale: float | None,
    beyond_trained: bool,
    policy: Policy = "ladder",
) -> RequestPlan:
    """`plan_request`, within the largest trained window (native_window * max_scale tokens) unless `beyond_trained`.

    Raises RefusedError with the numbers for a longer request, ValueError for what makes no sense.
    """
    plan = plan_request(
        prompt_tokens,
        native_window=native_window,
        max_scale=max_scale,
        policy=policy,
        schedule=schedule,
        max_new_tokens=max_new_tokens,
        scale=scale,
    )
    total, largest = prompt_tokens + plan.max_new_tokens, int(native_window * max_scale)
    if total > largest and not beyond_trained:
        raise RefusedError(
            f"prompt ({prompt_tokens}) + new tokens ({plan.max_new_tokens}) = {total} tokens: the largest trained "
            f"window is {largest} tokens; shorten the request, or set beyond_trained"
        )
    return plan
