"""AdamW in float32 over bfloat16 weights: the 16 bits that a weight lacks stand beside it, so nothing is rounded away.

Flows in: bfloat16 parameters and their bfloat16 gradients. Flows out: updated parameters. A float32 master weight is
cut into its upper half, which is the parameter that the model computes with, and the rest, an int16 in the
optimizer's state: 14 bytes a weight with gradient and both moments, where float32 weights under autocast take 16 and
a bfloat16 copy. On a GPU one launch of a Triton kernel reads and writes each value once, clipping included. Knows no
model and no Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Float32 masters of `high` (bfloat16) and `low` (int16, in units of the last place of float32)."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bfloat16, int16) halves of finite float32 values; `join` gives the same bits back.

    Rounded to the nearest bfloat16, halves away from zero: of two neighbours at the same distance only that one leaves
    a rest that fits into 16 bits.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose arithmetic, moments and masters are float32 and whose weights are
    bfloat16.

    The update is torch.optim.AdamW's, in its order of operations. Raises ValueError for a parameter of another type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._coefficient: torch.Tensor | None = None
        self._plans: dict[Any, Any] = {}
        for parameter in self._parameters():
            if parameter.dtype != torch.bfloat16 or not parameter.is_contiguous():
                raise ValueError(
                    f"a parameter of type {parameter.dtype} and shape {tuple(parameter.shape)}: SplitAdamW takes "
                    "contiguous bfloat16 parameters; load the model with model.dtype = bfloat16, or use "
                    "train.optimizer = adamw"
                )

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Norm of all gradients (float32 scalar on their device). The next step multiplies them by max_norm / norm
        where that is below 1; the gradients themselves stay as they are. 0 does not clip."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm > 0:
            self._coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. A closure is refused: nothing here needs the loss again."""
        if closure is not None:
            raise ValueError("closure: SplitAdamW computes no loss; call step() after backward()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
            self._update(group)
        self._coefficient = None

    def _update(self, group: dict[str, Any]) -> None:
        """All parameters of a group that have a gradient, by the kernel where there is one."""
        found = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not found or not _has_kernel(found[0]):
            for parameter in found:
                _update(parameter, self.state[parameter], group, self._coefficient)
            return
        from e2llm.train.split_adamw_launch import launch

        by_step: dict[int, list[torch.Tensor]] = {}
        for parameter in found:
            by_step.setdefault(self.state[parameter]["step"], []).append(parameter)
        for step, parameters in by_step.items():
            states = [self.state[parameter] for parameter in parameters]
            launch(parameters, states, group, *_corrections(step, group), self._coefficient, self._plans)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State as it was saved. torch's own would cast every state tensor to the parameter's type, which is what the
        state holds more than."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, self._parameters(), strict=True):
            saved = state_dict["state"].get(name, {})
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                for key, value in saved.items()
            }


def _has_kernel(parameter: torch.Tensor) -> bool:
    """Whether it is where the kernel runs. That Triton is installed there, `packages` has looked before."""
    return parameter.is_cuda


def _update(
    parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any], coefficient: torch.Tensor | None
) -> None:
    """One parameter's update in plain PyTorch: the oracle of the kernel."""
    beta1, beta2 = group["betas"]
    assert parameter.grad is not None
    found = parameter.grad.float()
    if coefficient is not None:
        found = found * coefficient
    master = join(parameter, state["low"])
    master.mul_(1 - group["lr"] * group["weight_decay"])
    state["exp_avg"].lerp_(found, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(found, found, value=1 - beta2)
    size, root = _corrections(state["step"], group)
    deviation = (state["exp_avg_sq"].sqrt() / root).add_(group["eps"])
    master.addcdiv_(state["exp_avg"], deviation, value=-size)
    high, low = split(master)
    parameter.copy_(high)
    state["low"].copy_(low)


def _corrections(step: int, group: dict[str, Any]) -> tuple[float, float]:
    """Step size over the first moment's bias, root of the second's."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
