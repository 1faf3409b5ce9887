"""Decoder layers under torch.compile: for good where a model is trained, for a while where it is measured.

Flows in: a causal LM. Flows out: the same model, its layers compiled. A layer at a time and never the whole: traced
whole, transformers builds a T x T mask, which loses the flash path; and thirty equal layers compile once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from e2llm.hf.rotary import find_rotary_owner, unwrap


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the base model, whatever their list is called. Raises ValueError where there is no list."""
    lists = [child for child in find_rotary_owner(model).children() if isinstance(child, nn.ModuleList)]
    if not lists:
        kind = getattr(getattr(unwrap(model), "config", None), "model_type", type(model).__name__)
        raise ValueError(f"compile = 'layers': model type {kind!r} has no list of layers; use compile = 'none'")
    return max(lists, key=len)


def keep_compile_workers() -> None:
    """Let torch keep the processes in which it compiles kernels. It ends them after a minute without work and forks new
    ones for the next kernel, from a process that has threads by then: torch 2.11 can wait for those for good (pytorch
    issues 176968 and 186136), as a run would that evaluates a minute after it began."""
    if hasattr(torch._inductor.config, "quiesce_async_compile_pool"):
        torch._inductor.config.quiesce_async_compile_pool = False


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer, for good. A layer that is compiled already stays as it is."""
    keep_compile_workers()
    for layer in decoder_layers(model):
        if layer._compiled_call_impl is None:
            layer.compile()


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Within the block each compiled layer is one graph, under DDP too.

    torch would cut whatever is compiled while a DDP module runs at the sizes of its buckets, so that a model in one
    graph can send some gradients before it has them all. A layer at a time has its gradients soon enough; cut in five,
    it keeps more for its backward pass and fuses less.
    """
    with torch._dynamo.config.patch(optimize_ddp=False):  # type: ignore[no-untyped-call, attr-defined]
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block compiled layers run as they are written. For probes: to compile for a few tokens takes longer
    than to train a hundred steps, a minute where weights lie in host memory."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
        # flex attention says that it holds all scores: of a few tokens
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


@contextlib.contextmanager
def layers_compiled(model: nn.Module, kept: dict[nn.Module, Any]) -> Iterator[None]:
    """The layers compiled inside, and as they were outside: a decoding step of one token would compile them again for
    every length. `kept` holds the compiled calls between uses; give the same dict each time."""
    keep_compile_workers()
    layers = list(decoder_layers(model))
    before = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            if layer._compiled_call_impl is None and layer not in kept:
                layer.compile()
                kept[layer] = layer._compiled_call_impl
            layer._compiled_call_impl = kept.get(layer, layer._compiled_call_impl)
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call
