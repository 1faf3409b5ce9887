"""A model whose layers let keys of earlier segments count for more, through the kernels that it has anyway.

Flows in: a transformers model. Flows out: the same model; while its forwards are given `far_tables`, queries and keys
of layers with full attention get those channels and the values as many zeros, and PyTorch's scaled dot product
attention computes the rest, causal and in one pass. Without tables, and in layers of a sliding window, nothing
changes.

B = batch, T = tokens, H = query heads, G = key-value heads, D = head dim, E = added channels
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from e2llm.hf.compiled import uncompiled
from e2llm.hf.extension import FAR_TABLES, Extension, get_extension
from e2llm.hf.far_tables import CHANNELS, FarTables
from e2llm.hf.read_once import is_placeholder
from e2llm.hf.rotary import unwrap

ATTENTION = "e2llm_far"
"""Name in transformers' registry."""
OWN = "sdpa"
"""The attention that it builds on."""
_PROBE_TOKENS = 6


def attend_far(model: nn.Module) -> None:
    """Give an extended `model` the attention that knows `far_tables`, for good; one that has it stays as it is.

    Raises ValueError, naming what is in the way: another attention than `sdpa`, or a model whose layers do not take
    their attention from transformers' interface or do not hand on what it needs.
    """
    inner, extension = cast(Any, unwrap(model)), _extension_of(model)
    own = inner.config._attn_implementation
    if own == ATTENTION:
        extension.attends_far = True  # another one may have been taken off since
        return
    check_far(own)
    AttentionInterface.register(ATTENTION, far_attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[OWN])
    inner.set_attn_implementation(ATTENTION)
    try:
        if not any(map(is_placeholder, inner.parameters())):  # else the process that holds the weights tries
            _probe(inner, extension)
    except BaseException:
        inner.set_attn_implementation(OWN)
        raise
    extension.attends_far = True


def check_far(attention: str | None) -> None:
    """Raise ValueError where a model of this attention (`_attn_implementation` of its config) cannot weigh far keys."""
    if attention not in (OWN, ATTENTION):
        raise ValueError(
            f"placement.far_weight: attention {attention!r} cannot weigh far keys; load the model with "
            f"model.attn_implementation = {OWN!r}, or use far_weight = 0"
        )


def attend_plainly(model: nn.Module) -> None:
    """Undo `attend_far`."""
    inner = cast(Any, unwrap(model))
    if inner.config._attn_implementation == ATTENTION:
        inner.set_attn_implementation(OWN)
    _extension_of(model).attends_far = False


@contextmanager
def attending_far(model: nn.Module) -> Iterator[None]:
    """`attend_far` within the block."""
    attend_far(model)
    try:
        yield
    finally:
        attend_plainly(model)


def far_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    far_tables: FarTables | None = None,
    **others: Any,
) -> tuple[torch.Tensor, Any]:
    """transformers' attention signature: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D)."""
    own = ALL_ATTENTION_FUNCTIONS[OWN]
    given = {"scaling": scaling, "sliding_window": sliding_window, **others}
    if far_tables is None or sliding_window is not None:
        found: tuple[torch.Tensor, Any] = own(module, query, key, value, attention_mask, **given)
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    of_queries, of_keys = (table[:, :, : query.shape[2]] for table in far_tables)
    width, same = value.shape[-1], value.shape[-1] == query.shape[-1]
    query = _wider(query, of_queries / scale)
    key = _wider(key, of_keys)
    if same:  # kernels want one head dim for all three
        value = F.pad(value, (0, query.shape[-1] - width))
    out, weights = own(module, query, key, value, attention_mask, **(given | {"scaling": scale}))
    return out[..., :width], weights


def _wider(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) with (B, 1, T, E) channels after its own, in its own type."""
    added = channels.to(device=x.device, dtype=x.dtype).expand(-1, x.shape[1], -1, -1)
    return torch.cat((x, added), dim=-1)


@torch.no_grad()
def _probe(inner: Any, extension: Extension) -> None:
    """Whether tables reach the layers: the last token alone is to see nothing but itself."""
    kind, training = inner.config.model_type, inner.training
    vocabulary = inner.get_input_embeddings().num_embeddings
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=inner.device)[None] % vocabulary
    at = torch.arange(_PROBE_TOKENS, device=inner.device)
    last = (at == _PROBE_TOKENS - 1)[None, None, :, None].expand(1, 1, -1, CHANNELS)
    tables = (last * (-1e4 / CHANNELS), (~last).float())
    inner.eval()
    try:
        with extension.using(None), uncompiled():
            plain = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            far = inner.base_model(input_ids=ids, use_cache=False, **{FAR_TABLES: tables}).last_hidden_state
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"placement.far_weight: model type {kind!r} does not take it ({error}); use far_weight = 0"
        ) from error
    finally:
        inner.train(training)
    moved = (far - plain).float().norm(dim=-1)[0] / plain.float().norm(dim=-1)[0]
    if moved[-1] <= 4 * moved[:-1].max() + 1e-6:  # the others may round in another way at another head dim
        raise ValueError(
            f"placement.far_weight: the layers of model type {kind!r} do not hand its tables on to their attention; "
            "use far_weight = 0"
        )


def _extension_of(model: nn.Module) -> Extension:
    extension = get_extension(model)
    if extension is None:
        raise ValueError("placement.far_weight: the model is not extended; call install(model) first")
    return extension
