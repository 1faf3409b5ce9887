"""Projections of the same input as one matrix product: queries, keys and values, and the two halves of a gated MLP.

Flows in: the graph that Dynamo traced of a decoder layer. Flows out: the same function, with the weights of such
products laid one under another. Whatever the modules are called: what is joined is what reads one tensor. Backwards,
the input's gradient is one product where it was several, each written out and added; the weights stay parameters of
their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

# N = rows (batch x tokens), H = input features, O = output features of all that is joined

ROWS = 8
"""Rows for each output feature from which products are joined: laying the weights together moves 3 · H · O numbers a
step, joined products of n save 2 · (n - 1) · N · H."""

_LINEAR = (torch._C._nn.linear, F.linear)
Compiled = Callable[..., Any]


def joined_inductor(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Compiled:
    """A backend of torch.compile: torch's own, of the joined graph."""
    from torch._inductor.compile_fx import compile_fx

    join_projections(graph)
    return cast(Compiled, compile_fx(graph, inputs))


def join_projections(graph: fx.GraphModule) -> int:
    """Join in place; how many products are gone."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR and (key := _key(node)) is not None:
            groups.setdefault(key, []).append(node)
    gone = 0
    for nodes in groups.values():
        if len(nodes) > 1 and _pays(nodes):
            _join(graph.graph, nodes)
            gone += len(nodes) - 1
    if gone:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return gone


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight, bias (None: none)."""
    found = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return found["input"], found["weight"], found.get("bias")


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _key(node: fx.Node) -> tuple[Any, ...] | None:
    """What products that can be joined have in common: the input, the type, whether there is a bias and whether weights
    train (frozen ones beside trained ones would get gradients that no one wants). None: cannot be joined."""
    source, weight, bias = _arguments(node)
    given = [weight] if bias is None else [weight, bias]
    # A weight that is computed may not be there yet where the first product of a group stands.
    if any(not isinstance(part, fx.Node) or part.op not in ("placeholder", "get_attr") for part in given):
        return None
    values = [_example(part) for part in given]
    if any(not isinstance(value, torch.Tensor) for value in values) or values[0].dim() != 2:
        return None
    return source, values[0].dtype, values[0].device, bias is None, *(value.requires_grad for value in values)


def _pays(nodes: list[fx.Node]) -> bool:
    source = _example(_arguments(nodes[0])[0])
    if not isinstance(source, torch.Tensor):
        return False
    rows = source.numel() // source.shape[-1]
    return bool(rows >= ROWS * sum(_example(_arguments(node)[1]).shape[0] for node in nodes))


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    source, _, first_bias = _arguments(nodes[0])
    weights = [_arguments(node)[1] for node in nodes]
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(torch.cat, (weights, 0))
        bias = None if first_bias is None else graph.call_function(torch.cat, ([_arguments(n)[2] for n in nodes], 0))
        product = graph.call_function(F.linear, (source, weight, bias))
        sizes = [_example(part).shape[0] for part in weights]
        parts = graph.call_function(torch.split, (product, sizes, -1))
        for number, node in enumerate(nodes):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, number)))
    for node in nodes:
        graph.erase_node(node)
