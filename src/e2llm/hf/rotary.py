"""Reads a rotary module: where it sits on a model, what its frequencies are, how it lays out cos and sin.

Flows in: a transformers model. Flows out: its rotary module, a `Rope` for each layer type, a layout.
All knowledge of how transformers spells these things is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from e2llm.positions.rope import Rope

# B = batch, T = tokens, D = rotary_dim

SUPPORTED = (
    "supported are transformers causal LMs whose base model owns one `rotary_emb` (Llama, Mistral, Qwen, Gemma, Phi-3, "
    "GPT-NeoX, OLMo, SmolLM3, Granite, GLM, Cohere, mixture-of-experts ones, ...)"
)

LayerType = str | None
Layout = Callable[[torch.Tensor, float | torch.Tensor], Any]


def _half_split(angles: torch.Tensor, scale: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D/2) -> cos, sin (B, T, D): channel j is paired with j + D/2 (Llama)."""
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos() * scale, doubled.sin() * scale


def _interleaved(angles: torch.Tensor, scale: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D/2) -> cos, sin (B, T, D): channel 2j is paired with 2j + 1 (Cohere)."""
    doubled = torch.repeat_interleave(angles, 2, dim=-1)
    return doubled.cos() * scale, doubled.sin() * scale


def _compact(angles: torch.Tensor, scale: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D/2) -> cos, sin (B, T, D/2) (gpt-oss)."""
    return angles.cos() * scale, angles.sin() * scale


def _complex(angles: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """(B, T, D/2) -> complex64 (B, T, D/2) (Llama 4, DeepSeek-V2)."""
    return torch.polar(torch.ones_like(angles), angles) * scale


LAYOUTS: dict[str, Layout] = {
    "half_split": _half_split,
    "interleaved": _interleaved,
    "compact": _compact,
    "complex": _complex,
}


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def unwrap(model: Any) -> nn.Module:
    """The transformers model inside PEFT, DDP or torch.compile wrappers."""
    if hasattr(model, "get_base_model"):
        return unwrap(model.get_base_model())
    if hasattr(model, "_orig_mod"):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    assert isinstance(model, nn.Module)
    return model


def _has_frequencies(module: nn.Module) -> bool:
    held = isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    return held or any(name.endswith("_inv_freq") for name, _ in module.named_buffers(recurse=False))


def find_rotary_owner(model: nn.Module) -> nn.Module:
    """The base model that owns `rotary_emb`. Raises ValueError naming the model type where there is none, or several
    rotary modules whose roles cannot be told apart."""
    inner = unwrap(model)
    owner: Any = getattr(inner, "base_model", inner)
    if not hasattr(owner, "rotary_emb"):
        owner = getattr(inner, "model", owner)  # Llama 4: its base_model prefix names the multimodal wrapper
    # A falcon with ALiBi owns a rotary module too, and never calls it.
    alibi = bool(getattr(getattr(inner, "config", None), "alibi", False))
    rotary = getattr(owner, "rotary_emb", None)
    # CodeGen and GPT-J own a table of sines, from transformers 5.24 on under the same name.
    if alibi or not isinstance(rotary, nn.Module) or not any(map(_has_frequencies, rotary.modules())):
        kind = "no rotary embedding on its base model that holds an inv_freq"
        if alibi or _model_type(inner) in {"bloom", "mpt"}:
            kind = "ALiBi instead of rotary positions"
        elif any(name.endswith(("wpe", "embed_positions")) for name, _ in inner.named_modules()):
            kind = "learned or computed absolute positions instead of rotary ones"
        raise ValueError(f"model type {_model_type(inner)!r} has {kind}; {SUPPORTED}")
    # The module below the owner's rotary (a wrapper's inner) is not another one.
    mine = {id(module) for module in owner.rotary_emb.modules()}
    others = [
        name for name, module in inner.named_modules() if "Rotary" in type(module).__name__ and id(module) not in mine
    ]
    if others:
        raise ValueError(
            f"model type {_model_type(inner)!r} has further rotary modules ({', '.join(others[:4])}), which a scale on "
            f"the base model's would leave behind; {SUPPORTED}"
        )
    return owner


def _native_window(config: Any, parameters: dict[str, Any]) -> int:
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "longrope" and original:
        return int(original)
    window = getattr(config, "max_position_embeddings", None)
    if not window:
        raise ValueError(
            f"model type {config.model_type!r}: its config has no max_position_embeddings; pass native_window"
        )
    return int(window)


def layer_types(rotary: nn.Module) -> list[LayerType]:
    """Layer types that have frequencies of their own; [None] for a module with one set."""
    if isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        return [None]
    suffix = "_inv_freq"
    names = [name[: -len(suffix)] for name, _ in rotary.named_buffers(recurse=False) if name.endswith(suffix)]
    found: list[LayerType] = [n for n in names if not n.endswith(("_original", "_long"))]
    if not found:
        raise ValueError(f"rotary module {type(rotary).__name__} holds no inv_freq; {SUPPORTED}")
    return found


def is_local(layer_type: LayerType) -> bool:
    """Layers that attend to a sliding window or chunk only: they never see a distance that training did not, so they
    keep the model's own positions."""
    return layer_type is not None and any(word in layer_type for word in ("sliding", "local", "chunked"))


def read_rope(rotary: nn.Module, config: Any, layer_type: LayerType = None, native_window: int | None = None) -> Rope:
    """`Rope` of a rotary module, built after loading from its own float32 frequencies.

    Raises ValueError for frequencies that were cast below float32 or never initialised.
    """
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq: torch.Tensor = getattr(rotary, f"{prefix}inv_freq")
    if inv_freq.dtype != torch.float32:
        raise ValueError(
            f"rotary_emb.{prefix}inv_freq is {inv_freq.dtype}: angles need float32. Load the model with "
            "from_pretrained(..., dtype=...) instead of casting it with .to(), .half() or .bfloat16()"
        )
    if inv_freq.is_meta:
        raise ValueError(f"rotary_emb.{prefix}inv_freq is on the meta device: load the weights before extending")
    # A dynamic or longrope module may have changed its table in an earlier long forward; this is the one it began with.
    original = getattr(rotary, f"{prefix}original_inv_freq", inv_freq)
    values = original.detach().float().cpu()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or float(values[0]) == 0.0:
        raise ValueError(f"rotary_emb.{prefix}inv_freq holds no frequencies ({values[:4].tolist()}): not initialised")
    parameters = dict(config.rope_parameters)
    if layer_type is not None and isinstance(parameters.get(layer_type), dict):
        parameters = dict(parameters[layer_type])
    window = native_window or _native_window(config, parameters)
    long_factors = parameters.get("long_factor")
    original_window = parameters.get("original_max_position_embeddings")
    max_scale = None
    if long_factors is not None and original_window:
        max_scale = float(parameters.get("factor") or config.max_position_embeddings / original_window)
    return Rope(
        rotary_dim=2 * values.numel(),
        base=float(parameters.get("rope_theta") or 10000.0),
        native_window=window,
        inv_freq=tuple(values.tolist()),
        attention_scale=float(getattr(rotary, f"{prefix}attention_scaling", 1.0)),
        rope_type=str(parameters.get("rope_type", "default")),
        long_factors=tuple(float(f) for f in long_factors) if long_factors is not None else None,
        max_scale=max_scale,
    )


def call_rotary(rotary: nn.Module, x: torch.Tensor, position_ids: torch.Tensor, layer_type: LayerType) -> Any:
    """The module's own answer."""
    return rotary(x, position_ids) if layer_type is None else rotary(x, position_ids, layer_type)


@torch.no_grad()
def detect_layout(rotary: nn.Module, rope: Rope, layer_type: LayerType) -> tuple[str, bool]:
    """(layout name, whether the output takes x's dtype), found by asking the module and comparing with each layout.

    Raises ValueError when none reproduces the module's own tables.
    """
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq: torch.Tensor = getattr(rotary, f"{prefix}inv_freq")
    position_ids = _probe_positions(rotary, rope, layer_type).to(inv_freq.device)[None]
    x = torch.zeros(1, position_ids.shape[1], 1, dtype=torch.float32, device=inv_freq.device)
    own = call_rotary(rotary, x, position_ids, layer_type)
    angles = position_ids[..., None].float() * torch.tensor(rope.inv_freq, device=inv_freq.device)
    for name, layout in LAYOUTS.items():
        ours = layout(angles, rope.attention_scale)
        if _same(own, ours):
            if name == "complex":
                return name, False
            low = call_rotary(rotary, x.to(torch.bfloat16), position_ids, layer_type)
            return name, low[0].dtype == torch.bfloat16
    raise ValueError(
        f"rotary module {type(rotary).__name__} lays out cos and sin in a way we do not know "
        f"(known: {', '.join(LAYOUTS)}); {SUPPORTED}"
    )


def _probe_positions(rotary: nn.Module, rope: Rope, layer_type: LayerType) -> torch.Tensor:
    """Up to seven positions (N,) int64, apart where there is room, all inside the window up to which a longrope or
    dynamic module keeps the table it began with."""
    parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    parameters = parameters.get(layer_type, parameters)
    window = min(rope.native_window, int(parameters.get("original_max_position_embeddings") or rope.native_window))
    count = max(2, min(7, window))  # position 0 alone looks the same in every layout
    return torch.arange(count) * max(1, min(5, (window - 1) // (count - 1)))


def _same(own: Any, ours: Any) -> bool:
    if isinstance(own, torch.Tensor) != isinstance(ours, torch.Tensor):
        return False
    pairs = [(own, ours)] if isinstance(own, torch.Tensor) else list(zip(own, ours, strict=True))
    return all(a.shape == b.shape and torch.allclose(a.to(b.dtype), b, atol=1e-5, rtol=1e-5) for a, b in pairs)
