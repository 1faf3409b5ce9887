"""What the machine itself can do, measured in the same run: the time that serving cannot go below.

Flows in: a model's shapes and a number of tokens. Flows out: seconds of its matrix products and of its attention alone,
by the libraries that are there, and the bandwidth of a large copy. Nothing here runs the model.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

# H = query heads, G = key-value heads, D = head dim, N = tokens

REPEATS = 5
COPY_BYTES = 2**31
"""Of the measured copy on a GPU; a sixteenth of it on a CPU."""


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of `run`, after one run that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy within the device's memory, read and written ones counted."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def matmul_seconds(model: Any, num_tokens: int, chunk_tokens: int) -> float:
    """The matrix products of all linear layers but the head, over `num_tokens` tokens in chunks; random operands."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = Counter((m.in_features, m.out_features) for m in layers)
    device, dtype, total = model.device, model.dtype, 0.0
    chunk = min(chunk_tokens, num_tokens)
    for (wide, out), count in shapes.items():
        x = torch.randn(chunk, wide, device=device, dtype=dtype)
        weight = torch.randn(out, wide, device=device, dtype=dtype)
        total += count * seconds_of(lambda x=x, weight=weight: linear(x, weight), device)  # type: ignore[misc]
    return total * num_tokens / chunk


def attention_seconds(model: Any, num_tokens: int) -> float:
    """Causal attention of all layers over `num_tokens` tokens in one pass each. Raises ValueError for a model with
    sliding windows, whose floor is another."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or getattr(config, "sliding_window", None):
        raise ValueError(f"model type {config.model_type!r}: the floor is known for full attention only")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v = (
        torch.randn(1, count, num_tokens, dim, device=model.device, dtype=model.dtype)
        for count in (heads, groups, groups)
    )
    one_layer = seconds_of(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), model.device, repeats=3
    )
    return float(one_layer * config.num_hidden_layers)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decoding step reads: all but an input embedding that is not the head as well."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return int(total if tied else total - table.numel() * table.element_size())
