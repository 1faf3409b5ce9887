"""Tiny random causal LMs of many architectures, made in the test."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

WINDOW = 64
"""Native window L of the tiny models, tokens."""
VOCABULARY = 128

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "sliding_window": 512,
}
_NO_HEAD_DIM = {"gpt_neox", "falcon", "phi", "persimmon", "stablelm", "gpt_neox_japanese"}
_MULTI_LATENT = {"deepseek_v2", "deepseek_v3", "minicpm3", "dots1"}
_EAGER_ONLY = {"gemma2", "gpt_oss", "bloom", "mpt", "gptj", "codegen", "mamba", "xglm", "rwkv"}
"""Without SDPA in transformers."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Config of a two-layer model of `model_type` with native window 64."""
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type)
    always = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"}
    sizes = {k: v for k, v in _SIZES.items() if k in always or hasattr(defaults, k)}
    if model_type in _NO_HEAD_DIM:
        sizes.pop("head_dim", None)
    if model_type in _MULTI_LATENT:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if model_type in {"gptj", "codegen"}:
        sizes["rotary_dim"] = 16
    if model_type == "gpt_oss":  # published with YaRN
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 150000.0}
    if model_type in {"gemma3_text", "olmo3"}:  # one local and one full layer
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    return AutoConfig.for_model(model_type, **(sizes | overrides))


def tiny_model(model_type: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any) -> nn.Module:
    """Random float32 causal LM in evaluation mode; large enough weights that positions move the logits."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **overrides)
    if model_type in _EAGER_ONLY and attn_implementation == "sdpa":
        attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
    return model


def with_rope(config: Any, **rope: Any) -> Any:
    """Copy of `config` whose full-attention rope parameters are updated with `rope`."""
    changed = copy.deepcopy(config)
    parameters = dict(changed.rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        parameters["full_attention"] = {**parameters["full_attention"], **rope}
    else:
        parameters |= rope
    changed.rope_parameters = parameters
    return changed


def statically_scaled(model: nn.Module, **rope: Any) -> nn.Module:
    """transformers' own model of the same weights with `rope` in its config: the independent implementation."""
    from transformers import AutoModelForCausalLM

    config = with_rope(model.config, **rope)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def token_ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """(batch, tokens) int64 without the special tokens."""
    return torch.randint(3, VOCABULARY - 8, (batch, tokens), generator=torch.Generator().manual_seed(seed))
