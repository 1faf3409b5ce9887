"""What a profiled step cannot go below on its card, beside the peer's speed: whether a target is in reach at all.

Flows in: a Record of kind `benchmark_train` with a profile of ours and the Trainer's speed. Flows out: Markdown. Matrix
products and attention count as measured: they are the vendor's own kernels. What norms, activations, rotations and the
loss have to read and write counts at the memory's full speed, each tensor once.
"""

from __future__ import annotations

from docs_train_runs import Row, card, markdown

from e2llm.benchmark.shapes import SHAPES, Shape
from e2llm.plan.speed import GPUS, Gpu
from e2llm.records import Record
from e2llm.report.formats import format_window

AS_MEASURED = ("matrix products", "attention forward", "attention backward", "optimizer")
PEER = "hf"
_BYTES = 2
"""Of a bfloat16 number."""


def moved_per_token(shape: Shape) -> int:
    """Numbers that one layer's norms, activations and rotations read and write for one token, forward and backward, if
    each kernel that is not a product or attention is fused as far as can be and nothing is read twice.

    Forward: two norms (residual and what is added in, residual and normed out), rotation of queries and keys in and
    out, gate and up in and their product out. Backward: each norm's gradient, input and residual's gradient in, one
    gradient out; the rotation once more; the product's gradient, gate and up in, two gradients out.
    """
    wide, inner = shape.hidden_size, shape.intermediate_size
    head = wide // shape.num_attention_heads
    rotated = wide + shape.num_key_value_heads * head
    norms = 2 * 4 * wide + 2 * 4 * wide
    return norms + 2 * 2 * rotated + 3 * inner + 5 * inner


def floor_seconds(shape: Shape, gpu: Gpu, tokens: int, measured: dict[str, float]) -> tuple[float, float, float]:
    """Least seconds of a step over `tokens`: of kernels as measured, of the layers' traffic, of the loss, whose logits
    are written by a product, read once and overwritten once with their gradient."""
    kernels = sum(measured.get(kind, 0.0) for kind in AS_MEASURED)
    layers = shape.num_hidden_layers * moved_per_token(shape) * tokens * _BYTES / gpu.bytes_per_second
    loss = 2 * shape.vocab_size * tokens * _BYTES / gpu.bytes_per_second
    return kernels, layers, loss


def ceiling_blocks(record: Record) -> list[str]:
    """Nothing where not all weights are trained, the card has no data sheet here, or peer or profile is missing."""
    shape = SHAPES.get(record.config["shape"])
    gpu = next((gpu for name, gpu in GPUS.items() if name in card(record).lower()), None)
    profile = [row for row in record.rows if row["metric"] == "device_seconds_per_step"]
    peers = [r for r in record.rows if r["metric"] == "tokens_per_second" and r["trainer"] == PEER]
    if shape is None or shape.lora_rank or gpu is None or not profile or not peers:
        return []
    first: Row = profile[0]
    tokens = first["batch_size"] * first["window"]
    kernels, layers, loss = floor_seconds(shape, gpu, tokens, {row["kernels"]: row["value"] for row in profile})
    least, spent = kernels + layers + loss, sum(row["value"] for row in profile)
    peer = max(row["value"] for row in peers)
    table = [["least time of a step", "ms", "measured"], ["---", "---:", "---:"]]
    rest = spent - sum(row["value"] for row in profile if row["kernels"] in (*AS_MEASURED, "loss"))
    own_loss = sum(row["value"] for row in profile if row["kernels"] == "loss")
    table.append(["products, attention, optimizer: as measured", f"{kernels * 1e3:.1f}", f"{kernels * 1e3:.1f}"])
    traffic = "norms, activations, rotations; measured with copies and idle time"
    table.append([traffic, f"{layers * 1e3:.1f}", f"{rest * 1e3:.1f}"])
    table.append(["loss", f"{loss * 1e3:.1f}", f"{own_loss * 1e3:.1f}"])
    table.append(["together", f"{least * 1e3:.1f}", f"{spent * 1e3:.1f}"])
    text = (
        f"What a step of {first['batch_size']} × {format_window(first['window'])} cannot go below with these kernels "
        "for products and attention: every other tensor read and written once at "
        f"{gpu.bytes_per_second / 1e12:.2f} TB/s, all that the memory has, and no microsecond idle. That would be "
        f"{tokens / least:,.0f} tokens/s, {tokens / least / peer:.2f} × `{PEER}` at its fastest here; measured: "
        f"{tokens / spent:,.0f}, {least / spent:.0%} of it."
    )
    return [text, markdown(table)]
