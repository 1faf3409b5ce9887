"""Layers computed by several processes together, each with its share of the heads and of the MLP's channels.

Flows in: a causal LM, whole in every process or in the first one alone (`hf.read_once`), and a device mesh of one
dimension. Flows out: the same model, whose sharded weights are DTensors over that mesh, or a ValueError that says why
this model cannot be shared out so. Which matrices are cut, and how, is transformers' own plan of the model; the
cutting and the exchange are PyTorch's (`parallelize_module`; Shoeybi et al. 2019, arXiv 1909.08053, Sect. 3). What the
plan does not name (embeddings, most norms, the output layer) stays a plain tensor in every process. Knows no Trainer.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from e2llm.hf.compiled import uncompiled
from e2llm.hf.extension import get_extension
from e2llm.hf.read_once import is_placeholder
from e2llm.hf.rotary import find_rotary_owner, unwrap

FIELD = "distributed.tensor_parallel"
_PROBE_TOKENS = 8


def _of_heads() -> ParallelStyle:
    """A norm of each head: its weight is whole, its input this process's heads, so that gradients are summed. Which
    dimension the heads are says a label alone: nothing is moved."""
    return SequenceParallel(sequence_dim=2, use_local_output=True)


_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "replicated_with_grad_allreduce": _of_heads}
"""Name in transformers' plans -> PyTorch's style of the same meaning."""
_STAYS_WHOLE = ("embedding_rowwise",)
"""Styles of modules that take and give whole tensors and stay whole here: the loss in pieces reads the output layer,
which embeddings are tied to in many models."""


def check_shares(config: Any, processes: int) -> dict[str, str]:
    """The plan of a model with this transformers config: module path below its base, `*` for a number -> a style of
    `_STYLES`. Raises ValueError for a model that `processes` cannot share: no plan, a plan of other styles (fused
    projections, experts), or heads and channels that they do not divide."""
    text = config.get_text_config()
    kind = text.model_type
    use = f"use {FIELD} = 1, with distributed.strategy = fsdp2 to shard weights otherwise"
    told: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    plan = {path: style for path, style in told.items() if style not in _STAYS_WHOLE}
    if not plan:
        raise ValueError(f"{FIELD} = {processes}: transformers has no plan to cut model type {kind!r}; {use}")
    other = sorted({style for style in plan.values() if style not in _STYLES})
    if other:
        raise ValueError(
            f"{FIELD} = {processes}: the plan of model type {kind!r} cuts in ways that are not offered here "
            f"({', '.join(other)}); {use}"
        )
    heads = text.num_attention_heads
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "intermediate_size": text.intermediate_size,
    }
    for name, size in sizes.items():
        for one in size if isinstance(size, list | tuple) else (size,):
            if one % processes:
                raise ValueError(
                    f"{FIELD} = {processes}: does not divide the model's {name} = {one}; use a divisor of "
                    "all of " + ", ".join(f"{key} = {value}" for key, value in sizes.items())
                )
    return plan


def share_out(model: nn.Module, mesh: DeviceMesh) -> dict[nn.Parameter, nn.Parameter]:
    """Cut `model` for the processes of `mesh`, in place; old parameter -> the DTensor in its place, where that changed.

    A meeting of all processes. Where some hold placeholders, the first one sends its weights, one at a time; else each
    takes its share of its own. Weights and buffers are on the mesh's device afterwards. A few
    tokens then go through the model and must have the hidden states that they had before. Raises ValueError where they
    have not, or where the plan is not one for this model.
    """
    plan = check_shares(unwrap(model).config, mesh.size())  # type: ignore[union-attr]
    sent = _any(any(map(is_placeholder, model.parameters())))
    expected = _probe(model) if dist.get_rank() == 0 else None
    base, changed, seen = find_rotary_owner(model), {}, set[int]()
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    for name, module in base.named_modules():
        style = plan.get(re.sub(r"\b\d+\b", "*", name))
        before = _arrive(module, sent, device, seen)
        if style is None:
            continue
        parallelize_module(module, mesh, _STYLES[style](), src_data_rank=None)  # each cuts what it holds
        for key, old in before.items():
            changed[old] = module.get_parameter(key)
            seen.add(id(changed[old]))
            old.data = torch.empty(0, dtype=old.dtype)  # an optimizer still holds it
    for module in model.modules():  # the output layer, and what else stands beside the base
        _arrive(module, sent, device, seen)
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    _check(model, expected, mesh, bool(changed))
    return changed


def _arrive(module: nn.Module, sent: bool, device: torch.device, seen: set[int]) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, now whole and on `device`; each once, as tied ones stand in two modules."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
    for parameter in own.values():
        seen.add(id(parameter))
        if sent:
            shape, dtype = parameter.shape, parameter.dtype
            first = dist.get_rank() == 0
            whole = parameter.detach().to(device) if first else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(whole.contiguous() if first else whole, src=0)
            parameter.data = whole
        parameter.data = parameter.to(device)
    return own


@torch.no_grad()
def _probe(model: nn.Module) -> torch.Tensor:
    """(T, H) float32 hidden states of a few tokens, on the host."""
    inner: Any = unwrap(model)
    extension, training = get_extension(model), inner.training
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=inner.device)[None] % inner.config.get_text_config().vocab_size
    inner.eval()
    try:
        with uncompiled(), nullcontext() if extension is None else extension.using(None):
            hidden: torch.Tensor = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return hidden[0].float().cpu()
    finally:
        inner.train(training)


def _check(model: nn.Module, expected: torch.Tensor | None, mesh: DeviceMesh, cut: bool) -> None:
    box = [expected]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    tolerance = 1e-2 if next(model.parameters()).dtype == torch.float32 else 5e-2  # a wrong cut is wrong altogether
    problem = "" if cut else "no module of it is in its plan"
    try:
        apart = float((_probe(model) - box[0]).norm() / box[0].norm())
        if not apart <= tolerance:
            problem = f"cut by its plan it computes something else (hidden states {apart:.1%} apart)"
    except RuntimeError as error:  # a shape that does not fit: in every process of the mesh
        problem = f"cut by its plan it does not run ({str(error).splitlines()[0]})"
    if _any(bool(problem)):
        kind = unwrap(model).config.model_type  # type: ignore[union-attr]
        raise ValueError(f"{FIELD} = {mesh.size()}: model type {kind!r}: {problem}; use {FIELD} = 1")


def _any(flag: bool) -> bool:
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
