"""vLLM's rotary module with a table for every scale: each token of a batch reads the table of its request's scale.

Flows in: integer positions as vLLM counts them, and a buffer with the first row of each token's table. The positions
stay untouched, so that whatever else reads them (local layers, masks) is not affected. Needs vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.platforms import current_platform

from e2llm.vllm_plugin.marking import scaling_of
from e2llm.vllm_plugin.refusals import ROPE_TYPE, check_engine
from e2llm.vllm_plugin.scaling import Scaling
from e2llm.vllm_plugin.tables import rotary_tables, unscaled_rope

# T = tokens of a step, D = rotary_dim

_MODULES: dict[tuple[Any, ...], ManyScalesRotary] = {}


class ManyScalesRotary(RotaryEmbeddingBase):
    """Has no `cos_sin_cache`: code of vLLM that reads a rotary table past this module fails instead of reading the
    wrong rows."""

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype,
        scaling: Scaling,
        most_tokens: int,
    ) -> None:
        super().__init__(head_size, rotary_dim, scaling.native_window, base, is_neox_style, dtype, init_cache=False)
        device = torch.get_default_device()
        tables = rotary_tables(unscaled_rope(rotary_dim, base, scaling.native_window), scaling, dtype)
        self.tables: torch.Tensor
        self.register_buffer("tables", tables.to(device), persistent=False)  # (num_rows, D)
        self.row_starts: torch.Tensor
        row_starts = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        self.register_buffer("row_starts", row_starts, persistent=False)

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotated query and key; positions (T,) int64, query and key (T, heads * head_size)."""
        return RotaryEmbedding.forward_static(
            self._rows(positions), query, key, self.head_size, self.rotary_dim, self._tables(query), self.is_neox_style
        )

    def forward_cuda(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same by vLLM's kernel, in place."""
        from vllm import _custom_ops as ops

        tables = self._tables(query)
        ops.rotary_embedding(self._rows(positions), query, key, self.head_size, tables, self.is_neox_style)
        return query, key

    forward_cpu = forward_cuda

    def _rows(self, positions: torch.Tensor) -> torch.Tensor:
        assert positions.dim() == 1, "a rotary embedding of several axes"
        return positions + self.row_starts[: positions.shape[0]]

    def _tables(self, query: torch.Tensor) -> torch.Tensor:
        return self.tables if self.tables.dtype == query.dtype else self.tables.to(query.dtype)


def wrap_get_rope(original: Any) -> Any:
    """vLLM's `get_rope`, with our module for marked rope parameters, and tables as long as the longest request for
    the local layers of a marked model."""

    def get_rope(
        head_size: int,
        max_position: int,
        is_neox_style: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> Any:
        config = get_current_vllm_config_or_none()
        scaling = None if config is None or config.model_config is None else scaling_of(config.model_config)
        if scaling is None:
            return original(head_size, max_position, is_neox_style, rope_parameters, dtype, **more)
        if (rope_parameters or {}).get("rope_type") != ROPE_TYPE:
            longest = max(max_position, scaling.max_window)
            return original(head_size, longest, is_neox_style, rope_parameters, dtype, **more)
        assert rope_parameters is not None
        check_engine(config, scaling, is_cpu=current_platform.is_cpu())
        _install_runner_hooks(config)
        if any(value for name, value in more.items() if name != "mrope_positions_factor"):
            raise ValueError(f"get_rope is asked for {sorted(more)}: a rotary embedding that e2llm does not own")
        return _module(head_size, is_neox_style, rope_parameters, dtype or torch.get_default_dtype(), scaling, config)

    return get_rope


def _install_runner_hooks(config: Any) -> None:
    """Only where a marked model is built: in a worker."""
    if config.use_v2_model_runner:
        from e2llm.vllm_plugin.v2_runner import install
    else:
        from e2llm.vllm_plugin.v1_runner import install
    install()


def _module(
    head_size: int, is_neox_style: bool, parameters: dict[str, Any], dtype: torch.dtype, scaling: Scaling, config: Any
) -> ManyScalesRotary:
    """One module for all layers that ask alike, as vLLM does: the tables are large."""
    rotary_dim = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    most_tokens = config.scheduler_config.max_num_batched_tokens
    base = float(parameters["rope_theta"])
    device = torch.get_default_device()
    key = (head_size, rotary_dim, base, is_neox_style, dtype, device, scaling, most_tokens)
    if key not in _MODULES:
        _MODULES[key] = ManyScalesRotary(
            head_size, rotary_dim, base, is_neox_style, dtype, scaling=scaling, most_tokens=most_tokens
        )
    return _MODULES[key]
