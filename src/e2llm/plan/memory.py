"""Memory of training, part by part, for each GPU.

Flows in: a `Shape` and a recipe. Flows out: bytes by part. What a decoder layer keeps for its backward pass is counted
tensor by tensor for a layer that is compiled and whose attention is flash attention; the two factors beside the count
are measured ones. B = windows a GPU takes at once, T = tokens of a window.
"""

from __future__ import annotations

from e2llm.config import Recipe
from e2llm.hf.far_tables import added_channels
from e2llm.plan.masks import masks_of
from e2llm.plan.shape import Shape

# Against peaks measured on one H100 at T = 4096 (135M and 1B full, 7B LoRA, layers compiled) the count is within 5 %.
UNCOMPILED = 1.9
"""Kept bytes of a layer that is not compiled, relative to a compiled one: one measurement of the 135M shape."""
RECOMPUTED, RECOMPUTED_ADAPTERS = 1.15, 1.85
"""Bytes held while one layer is computed again and its gradients are made, relative to what it keeps, where all weights
train and where adapters do: least squares over the Records' recomputed runs (`plan.calibration`). The first rests on
the 1B shape's windows of 64k and 128k, the second on the 7B shape's, the only one with adapters."""
NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a 4-bit weight: half a byte, and for 64 of them a scale of one byte with a float32 for 256 of those."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def trained_parameters(shape: Shape, recipe: Recipe) -> int:
    """Numbers that the optimizer changes."""
    lora = recipe.lora
    if not lora.rank:
        return shape.num_parameters
    chosen = set(lora.target_modules)
    adapters = [a + b for name, a, b in shape.linear_sizes if not chosen or name in chosen]
    return lora.rank * sum(adapters) + (shape.num_embedding_parameters if lora.train_embeddings else 0)


def layer_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes that one decoder layer keeps for one token, a mean over layers: two residuals, two normed inputs, queries,
    keys and values, what attention returns, and gate, up and their product in the MLP. Without masks, whose bytes grow
    with the window."""
    low = recipe.train.precision == "bfloat16"
    number = 2 if low else 4
    whole = low and recipe.model.dtype == "float32" and recipe.distributed.strategy in ("none", "ddp")
    residual = 4 if whole or not low else 2  # autocast leaves sums of layers in the weights' own type
    wider = wider_attention(shape, recipe)
    masked = masks_of(shape, recipe).layers / shape.num_layers
    keys = shape.num_key_channels + masked * (shape.num_query_channels - shape.num_key_channels)
    attention = wider * (2 * shape.num_query_channels + 2 * keys)
    attention += shape.num_query_channels if wider > 1 else 0  # what is left of the answer without added channels
    kept: float = 2 * residual * shape.hidden_size
    kept += number * (2 * shape.hidden_size + attention + 3 * shape.intermediate_size)
    return kept * (1.0 if recipe.train.compile == "layers" else UNCOMPILED)


def wider_attention(shape: Shape, recipe: Recipe) -> float:
    """Channels of a head, those added for `placement.far_weight` included, relative to its own."""
    if not recipe.placement.far_weight:
        return 1.0
    own = shape.num_query_channels / shape.num_heads
    return 1.0 + added_channels(int(recipe.placement.most_segments)) / own


def weight_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes of the model as it is trained, adapters included."""
    number = _BYTES[recipe.model.dtype]
    adapters = 4.0 * trained_parameters(shape, recipe) if recipe.lora.rank else 0.0
    if recipe.model.quantization == "none":
        return shape.num_parameters * number + adapters
    whole = _resident_parameters(shape)
    return (shape.num_parameters - whole) * NF4 + whole * number + adapters


def offloaded_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes of frozen matrices that wait in host memory or on a disk (`model.offload`)."""
    if recipe.model.offload == "none":
        return 0.0
    return float(_BYTES[recipe.model.dtype]) * (shape.num_parameters - _resident_parameters(shape))


def _resident_parameters(shape: Shape) -> int:
    """Embeddings, output layer and norms, which stay on the GPU whatever `model.offload` says, and in their own type
    whatever `model.quantization` says. Experts that share one tensor are counted here too, though they are
    offloaded."""
    linear = sum(inputs * outputs for _, inputs, outputs in shape.linear_sizes)
    return shape.num_parameters - linear


def shards_of(recipe: Recipe, gpus: int) -> tuple[int, bool]:
    """(GPUs that share gradients and optimizer, whether they share the weights too)."""
    config = recipe.distributed
    shards = {"fsdp2": config.shard or gpus, "deepspeed": gpus}.get(config.strategy, 1)
    return shards, shards > 1 and (config.strategy == "fsdp2" or config.zero_stage == 3)


def training_memory(shape: Shape, recipe: Recipe, gpus: int = 1, recomputed: float | None = None) -> dict[str, float]:
    """Bytes by part on each of `gpus` GPUs, at the peak of a step. `recomputed`: another factor than `RECOMPUTED` or
    `RECOMPUTED_ADAPTERS`, to find it by."""
    config, train = recipe.distributed, recipe.train
    shards, sharded = shards_of(recipe, gpus)
    of_weights = shards if sharded else 1
    trained = trained_parameters(shape, recipe)
    number, tokens = _BYTES[recipe.model.dtype], train.batch_size * recipe.data.window
    split = train.optimizer == "adamw_split"  # bfloat16 gradients; two moments and the lower half of each master
    parts = {
        "weights": weight_bytes(shape, recipe) / of_weights,
        "gradients": trained * (2 if split else 4) / shards,
        "optimizer": trained * (10 if split else 8) / shards,
    }
    if recipe.model.offload != "none":  # all matrices of a layer are back while it is computed again
        away = offloaded_bytes(shape, recipe)
        parts["weights"] -= away
        parts["fetched layer"] = away / shape.num_layers
    if train.distill:
        parts["teacher"] = shape.num_parameters * (2.0 if train.precision == "bfloat16" else number)
    if config.cpu_offload:
        parts |= {"optimizer": 0.0} | ({"weights": 0.0, "gradients": 0.0} if of_weights > 1 else {})
    low = train.precision == "bfloat16"
    if of_weights > 1:  # two layers and the embeddings, gathered
        per_layer = (shape.num_parameters - shape.num_embedding_parameters) / shape.num_layers
        parts["gathered weights"] = (2 * per_layer + shape.num_embedding_parameters) * (2 if low else number)
    elif low and number == 4:
        copied = shape.num_parameters if recipe.model.offload == "none" else _resident_parameters(shape)
        parts["bfloat16 copies"] = copied * 2.0
    layer = layer_bytes(shape, recipe) * tokens
    residual = shape.hidden_size * (2 if low and number == 2 else 4) * tokens
    if train.logits_tokens:
        logits = min(train.logits_tokens, tokens) * shape.vocabulary_size * (4.0 if low else 8.0)
    else:
        logits = tokens * shape.vocabulary_size * 10.0  # its own type, and two of float32
    masks = masks_of(shape, recipe)
    if masks.shared:
        parts["attention masks"] = masks.shared + masks.layers * masks.of_layer
    parts["activations"] = layer * shape.num_layers
    if train.gradient_checkpointing:
        # Each layer's input, and the larger of two: the loss's logits, which are gone before a layer is computed again,
        # or all of such a layer, its mask included, and its gradients.
        again = layer * (recomputed or (RECOMPUTED_ADAPTERS if recipe.lora.rank else RECOMPUTED)) + masks.of_layer
        parts["activations"] = shape.num_layers * residual + max(again - logits, 0.0)
        if masks.shared:
            parts["attention masks"] = masks.shared
    parts["logits"] = logits
    return parts
