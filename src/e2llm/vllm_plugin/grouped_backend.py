"""vLLM's attention backend for method self_extend: its cache holds a far key beside each key and value.

Flows in: vLLM's batches and its cache, whose pages are made half as large again. Flows out: what `hf.packed` answers,
the code of e2llm's own engine: Triton kernels for single tokens on CUDA, gathered keys otherwise. Refuses layers that
do more than causal attention. Knows no scales; groups come with each batch (`grouped_step.NEXT_BATCH`). Needs vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from e2llm.hf.packed import KeyValuePages, PackedStep
from e2llm.hf.paged import Extras, LayerShape
from e2llm.vllm_plugin.grouped_step import NEXT_BATCH, batch_step, pages_of
from e2llm.vllm_plugin.refusals import FULL_CACHE_TYPES, GROUPED_BACKEND, check_grouped_layer

# T = tokens of a step, H = query heads, G = key-value heads, D = head dim, B = pages, S = tokens of a page

_NUMBERS = itertools.count()


class GroupedBackend(AttentionBackend):
    """What vLLM asks of a backend. `forward` writes the cache itself: far keys need the step's turns."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return GROUPED_BACKEND

    @staticmethod
    def get_impl_cls() -> type[GroupedAttention]:
        return GroupedAttention

    @staticmethod
    def get_builder_cls() -> type[GroupedMetadataBuilder]:
        return GroupedMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Room for a far key behind the value: 3 D numbers a head and token for 2 D."""
        return dataclasses.replace(spec, head_size_v=spec.head_size_v + spec.head_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A token's heads side by side in a page, as the kernels write them."""
        return (KVCacheLayout.LBNHC,)


def registered_backend() -> type[GroupedBackend]:
    """The backend, under a name that vLLM knows: its layers look theirs up."""
    if GROUPED_BACKEND not in AttentionBackendEnum.__members__:
        register_backend(GROUPED_BACKEND, f"{GroupedBackend.__module__}.{GroupedBackend.__qualname__}")
    return GroupedBackend


class GroupedMetadata:
    """Of one batch: what its step is made of, when the first layer attends. The same for all layers."""

    def __init__(self, pages: KeyValuePages, block_table: torch.Tensor, query_starts: np.ndarray, lengths: np.ndarray):
        self.pages, self._table, self._query_starts, self._lengths = pages, block_table, query_starts, lengths
        self.num_tokens = int(query_starts[-1])

    @functools.cached_property
    def step(self) -> PackedStep | None:
        """Of the batch; None for one that vLLM made up. Made after the runner has told the groups: vLLM builds metadata
        before that."""
        return batch_step(
            *(self.pages, self._table, self._query_starts, self._lengths, NEXT_BATCH), kernels=self._table.is_cuda
        )


class GroupedMetadataBuilder(AttentionMetadataBuilder[GroupedMetadata]):
    """No part of a step is recorded in a CUDA graph: lengths and groups are read on the host."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # single tokens first: those that kernels attend
        self._pages = KeyValuePages.borrowed(kv_cache_spec.block_size, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> GroupedMetadata:
        """Numbers of a batch. The upper bound of lengths is exact: speculation is refused."""
        count = common_attn_metadata.num_reqs
        query_starts = common_attn_metadata.query_start_loc_cpu[: count + 1].numpy().copy()
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound[:count].numpy().copy()
        return GroupedMetadata(self._pages, common_attn_metadata.block_table_tensor, query_starts, lengths)


class GroupedAttention(AttentionImpl[GroupedMetadata]):
    """One layer's attention. Raises ValueError, as the model is built, for a layer that it would get wrong."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        check_grouped_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=None if kv_cache_dtype in FULL_CACHE_TYPES else kv_cache_dtype,
            logits_soft_cap=logits_soft_cap or None,
            attn_type=None if attn_type == AttentionType.DECODER else attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **more,
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._number = next(_NUMBERS)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GroupedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (T, H, D), key and value (T, G, D), kv_cache (B, G, S, 3 D) -> output (T, H, D), written in place; T
        may be padded. Zeros in runs that only measure or record, with metadata or without."""
        assert output_scale is None and output_block_scale is None, "vLLM fuses no quantization that is not offered"
        if attn_metadata is None:
            return output.zero_()
        pages, tokens = attn_metadata.pages, attn_metadata.num_tokens
        pages.shapes[self._number] = LayerShape(
            self.num_kv_heads, self.head_size, value.shape[-1], kv_cache.dtype, None, far_dim=self.head_size
        )
        pages.layers[self._number] = pages_of(kv_cache)
        step = attn_metadata.step
        if step is None:
            return output.zero_()
        query, key, value = (x[:tokens].transpose(0, 1) for x in (query, key, value))
        output[:tokens] = step.attend(self._number, None, query, key, value, Extras(self.scale))
        return output
