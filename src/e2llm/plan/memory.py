"""Memory of training, part by part, for each GPU.

Flows in: a `Shape` and a recipe. Flows out: bytes by part. What a decoder layer keeps for its backward pass is counted
tensor by tensor, for a layer that is compiled and for one that is not, both with flash attention; the two factors
beside the count are measured ones. B = windows a GPU takes at once, T = tokens of a window.
"""

from __future__ import annotations

from e2llm.config import Recipe
from e2llm.hf.far_tables import added_channels
from e2llm.plan.masks import masks_of
from e2llm.plan.shape import Shape

PLAIN_LOSS = {True: 19.0, False: 17.0}
"""Bytes for each logit of a piece while its loss is made, not compiled, with logits in 16 bits and in float32: the
logits, a float32 copy of 16-bit ones, their exponential, the targets as bytes and as float32, and the difference.
Compiled, the logits and their gradient are all."""
RECOMPUTED, RECOMPUTED_ADAPTERS = 1.2, 1.8
"""Bytes held while one layer is computed again and its gradients are made, relative to what it keeps, where all weights
train and where adapters do: least squares over the Records' recomputed runs (`plan.calibration`). The first rests on
the 1B shape's windows of 64k and 128k, the second on the 7B shape's, the only one with adapters."""
AROUND_LOSS = 12
"""Bytes for each number of the last hidden states while the loss is computed: what enters the last norm and leaves it,
and their gradients. From the peaks of the 135M and 1B shapes over batches of 1 to 48 windows."""
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
    """Bytes that one decoder layer keeps for one token, compiled or not as the recipe has it. Without masks, whose
    bytes grow with the window."""
    return (compiled_layer_bytes if recipe.train.compile == "layers" else plain_layer_bytes)(shape, recipe)


def plain_layer_bytes(shape: Shape, recipe: Recipe) -> float:
    """As `compiled_layer_bytes`, of a layer that is not compiled. A norm keeps its input in float32 and, for its
    weight's gradient, what that multiplies; the MLP what its activation returns, too. Where residuals are float32,
    autocast makes a copy of a norm's output for each product that reads it; with adapters each of these does, and
    frozen weights, which have no gradient, keep nothing."""
    low = recipe.train.precision == "bfloat16"
    number, residual = (2 if low else 4), _residual_bytes(recipe)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kept = compiled_layer_bytes(shape, recipe) + number * inner + 2 * (4 - residual) * hidden
    if recipe.lora.rank:
        chosen = set(recipe.lora.target_modules)
        read = sum(inputs for name, inputs, _ in shape.linear_sizes if not chosen or name in chosen)
        # In place of the copy that all adapters of a compiled layer share, two normed inputs and the MLP's product.
        return kept + number * (read / shape.num_layers - 3 * hidden - inner)
    kept += 2 * residual * hidden
    return kept + (3 * number * hidden if residual > number else 0)  # five readers, two of them counted


def compiled_layer_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes that one decoder layer would keep for one token were it compiled, a mean over layers: two residuals, two
    normed inputs, queries, keys and values, what attention returns, and gate, up and their product in the MLP."""
    low = recipe.train.precision == "bfloat16"
    number = 2 if low else 4
    residual = _residual_bytes(recipe)
    wider = wider_attention(shape, recipe)
    masked = masks_of(shape, recipe).layers / shape.num_layers
    keys = shape.num_key_channels + masked * (shape.num_query_channels - shape.num_key_channels)
    attention = wider * (2 * shape.num_query_channels + 2 * keys)
    attention += shape.num_query_channels if wider > 1 else 0  # what is left of the answer without added channels
    if recipe.method == "self_extend":  # queries and keys as they stand in groups
        attention += shape.num_query_channels + keys
    kept: float = 2 * residual * shape.hidden_size
    kept += number * (2 * shape.hidden_size + attention + 3 * shape.intermediate_size)
    kept += number * shape.hidden_size if recipe.lora.rank else 0  # adapters read a copy
    return kept


def _residual_bytes(recipe: Recipe) -> int:
    """Of a number that goes from layer to layer: autocast leaves sums of layers in the weights' own type."""
    low = recipe.train.precision == "bfloat16"
    whole = low and recipe.model.dtype == "float32" and recipe.distributed.strategy in ("none", "ddp")
    return 4 if whole or not low else 2


def wider_attention(shape: Shape, recipe: Recipe) -> float:
    """Channels of a head, those added for `placement.far_weight` included, relative to its own."""
    if not recipe.weighs_by_channels:
        return 1.0
    own = shape.num_query_channels / shape.num_heads
    return 1.0 + added_channels(int(recipe.placement.most_segments)) / own


def weight_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes of the model as it is trained, adapters included."""
    number = _BYTES[recipe.model.dtype]
    adapters = 4.0 * trained_parameters(shape, recipe) if recipe.lora.rank else 0.0
    if recipe.model.quantization == "none":
        return shape.num_parameters * number + adapters
    packed = packed_parameters(shape, recipe)
    return packed * NF4 + (shape.num_parameters - packed) * number + adapters


def packed_parameters(shape: Shape, recipe: Recipe) -> int:
    """Weights that `model.quantization` holds in 4 bits."""
    return 0 if recipe.model.quantization == "none" else shape.num_parameters - _resident_parameters(shape)


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
    """The bytes by part of `training_peak`."""
    return training_peak(shape, recipe, gpus, recomputed)[1]


def training_peak(
    shape: Shape, recipe: Recipe, gpus: int = 1, recomputed: float | None = None
) -> tuple[str, dict[str, float]]:
    """(Moment of a step at which most is held, bytes by part on each of `gpus` GPUs then). `recomputed`: another factor
    than `RECOMPUTED` or `RECOMPUTED_ADAPTERS`, to find it by."""
    config, train = recipe.distributed, recipe.train
    shards, sharded = shards_of(recipe, gpus)
    of_weights = shards if sharded else 1
    trained = trained_parameters(shape, recipe)
    number = _BYTES[recipe.model.dtype]
    split = train.optimizer == "adamw_split"  # bfloat16 gradients; two moments and the lower half of each master
    parts = {
        "weights": weight_bytes(shape, recipe) / of_weights,
        "gradients": trained * (2 if split else 4) / shards,
        "optimizer": trained * (10 if split else 8) / shards,
    }
    away = offloaded_bytes(shape, recipe)
    parts["weights"] -= away
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
    masks = masks_of(shape, recipe)
    if masks.shared:
        parts["attention masks"] = masks.shared
        parts["attention masks"] += 0 if train.gradient_checkpointing else masks.layers * masks.of_layer
    kept_whole = recipe.accumulation(gpus) > 1 or config.strategy in ("ddp", "deepspeed")
    mask = masks.of_layer if train.gradient_checkpointing else 0.0
    moments = _moments(shape, recipe, parts["gradients"], kept_whole, mask, recomputed)
    if away:  # all matrices of a layer are back while it is computed again
        for name, held in moments.items():
            held["fetched layer"] = 0.0 if name == "in the loss" else away / shape.num_layers
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, parts | moments[moment]


def _moments(
    shape: Shape, recipe: Recipe, gradients: float, kept_whole: bool, mask: float, recomputed: float | None
) -> dict[str, dict[str, float]]:
    """Gradients, activations and logits at the three moments of which one is a step's peak. Layers give up what they
    keep as their weights get gradients, so that between the backward pass's ends no more is held than at one of them.
    `kept_whole`: gradients outlive a backward pass, as those of several batches and DDP's and DeepSpeed's buffers
    do."""
    train, tokens = recipe.train, recipe.train.batch_size * recipe.data.window
    low = train.precision == "bfloat16"
    number = 2 if low and recipe.model.dtype != "float32" else 4
    layer, hidden = layer_bytes(shape, recipe) * tokens, shape.hidden_size * tokens
    factor = recomputed or (RECOMPUTED_ADAPTERS if recipe.lora.rank else RECOMPUTED)
    output = shape.vocabulary_size * shape.hidden_size if not recipe.lora.rank or recipe.lora.train_embeddings else 0
    if train.logits_tokens:
        each = (4.0 if low else 8.0) if train.compile == "layers" else PLAIN_LOSS[low]
        pieces = min(train.logits_tokens, tokens) * shape.vocabulary_size * each
    else:
        pieces = tokens * shape.vocabulary_size * 10.0  # its own type, and two of float32
    kept = shape.num_layers * (hidden * number if train.gradient_checkpointing else layer)
    again = layer * (factor if train.gradient_checkpointing else factor - 1)
    # The output layer's gradient is a sum in float32 and the newest piece's.
    loss = {"gradients": output * (4.0 + number), "activations": kept + hidden * AROUND_LOSS, "logits": pieces}
    begun = {"gradients": output * float(number), "activations": kept + again + mask, "logits": 0.0}
    ended = {"gradients": gradients, "activations": layer * factor + mask, "logits": 0.0}
    if kept_whole:
        for moment in (loss, begun):
            moment["gradients"] = gradients
    return {
        "in the loss": loss,
        "at the last layer's backward pass": begun,
        "at the first layer's backward pass": ended,
    }
