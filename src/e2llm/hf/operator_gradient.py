"""Autograd of custom operators that return an attention's output and the logarithms of its sums.

Flows in: an operator and the one that takes its gradient back. Flows out: nothing; torch knows the gradient then. Knows
nothing of what they compute.
"""

from __future__ import annotations

from typing import Any

import torch


def register_gradient(forward: Any, backward: Any, num_tensors: int) -> None:
    """`forward` (tensors, sizes) -> (out, log_sums); `backward` (tensors, sizes, out, log_sums, gradient of out) ->
    gradients of the first tensors. num_tensors: of its arguments; those without a gradient among them get none."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs[:num_tensors], *output)
        ctx.sizes = inputs[num_tensors:]
        ctx.set_materialize_grads(False)

    def back(ctx: Any, out_gradient: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = num_tensors + len(ctx.sizes)
        if out_gradient is None:
            return (None,) * count
        *tensors, out, log_sums = ctx.saved_tensors
        found = backward(*tensors, *ctx.sizes, out, log_sums, out_gradient)
        return (*found, *(None,) * (count - len(found)))

    forward.register_autograd(back, setup_context=keep)
