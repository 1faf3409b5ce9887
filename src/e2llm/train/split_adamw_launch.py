"""One launch for all weights of a group: where they lie goes to the device as a table.

Flows in: parameters, their state and gradients. Flows out: a launch of the kernel. A launch for each of some hundred
tensors keeps the host busier than the device. What does not change from step to step (addresses of weights and state,
which program takes which part of which tensor) is made once; gradients lie elsewhere in every step, so their addresses
are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from e2llm.train.split_adamw_kernel import BLOCK, split_adamw

ALIGNED = 16
"""Elements by which a size must divide for wide loads, and bytes by which addresses do."""


@dataclass(frozen=True)
class Plan:
    """What stays the same for a set of parameters."""

    addresses: torch.Tensor
    """(P, 4) int64: weights, low halves, first and second moments."""
    sizes: torch.Tensor
    """(P,) int64, elements."""
    blocks: torch.Tensor
    """(programs, 2) int32: parameter, which BLOCK elements of it."""


def launch(
    parameters: list[torch.Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    size: float,
    root: float,
    coefficient: torch.Tensor | None,
    plans: dict[Any, Plan],
) -> None:
    """Update all of them; those whose sizes do not divide by `ALIGNED` in a launch of their own. `plans` is kept from
    step to step. size, root: learning rate and second moment, corrected for their bias."""
    device = parameters[0].device
    if coefficient is None:
        coefficient = torch.ones((), dtype=torch.float32, device=device)
    beta1, beta2 = group["betas"]
    for even in (True, False):
        chosen = [i for i, p in enumerate(parameters) if (p.numel() % ALIGNED == 0) == even and p.numel()]
        if not chosen:
            continue
        mine = [parameters[i] for i in chosen]
        plan = _plan(mine, [states[i] for i in chosen], plans)
        gradients = [_aligned(parameter.grad) for parameter in mine]  # held until the kernel is in the stream
        where = _sent([gradient.data_ptr() for gradient in gradients], torch.int64, device)
        split_adamw[(len(plan.blocks),)](
            plan.addresses, where, plan.sizes, plan.blocks, coefficient,
            1 - group["lr"] * group["weight_decay"], beta1, beta2, size, root, group["eps"],
            EVEN=even, BLOCK=BLOCK, enable_fp_fusion=True,
        )  # fmt: skip


def _plan(parameters: list[torch.Tensor], states: list[dict[str, Any]], plans: dict[Any, Plan]) -> Plan:
    rows = [
        (p.data_ptr(), s["low"].data_ptr(), s["exp_avg"].data_ptr(), s["exp_avg_sq"].data_ptr())
        for p, s in zip(parameters, states, strict=True)
    ]
    key = (tuple(rows), tuple(p.numel() for p in parameters))  # a tensor that has moved makes a new plan
    if key not in plans:
        device = parameters[0].device
        sizes = torch.tensor([p.numel() for p in parameters])
        programs = -(-sizes // BLOCK)
        owner = torch.repeat_interleave(torch.arange(len(parameters)), programs)
        part = torch.arange(len(owner)) - (programs.cumsum(0) - programs)[owner]
        blocks = torch.stack([owner, part], dim=1).to(torch.int32).to(device)
        if len(plans) > 8:  # of parameters that are gone
            plans.clear()
        plans[key] = Plan(_sent(rows, torch.int64, device), sizes.to(device), blocks)
    return plans[key]


def _sent(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    found = torch.tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _aligned(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    gradient = gradient.contiguous()
    return gradient if gradient.data_ptr() % ALIGNED == 0 else gradient.clone()
