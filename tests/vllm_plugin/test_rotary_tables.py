"""Tables against transformers' own static scaling, and which rows a batch reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model, with_rope
from model_configs import scaling

from e2llm.vllm_plugin.tables import rotary_tables, spread_row_starts, unscaled_rope, write_row_starts

SLOPE = {"training_slope": 0.0, "slope": 0.04}


def of_transformers(config: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, D/2) of transformers' own rotary module."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ids = torch.arange(positions)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, positions, 1), ids)
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("attention", [{}, SLOPE], ids=["own slope", "slope 0.04"])
@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_each_table_is_transformers_static_scaling(method: str, attention: dict) -> None:
    if method == "linear" and attention:
        pytest.skip("transformers' linear has no attention scale")
    served = scaling(method, attention=attention)
    config = tiny_model("llama").config
    tables = rotary_tables(unscaled_rope(16, 10000.0, 64), served, torch.float32)
    assert tables.shape == (served.num_rows, 16)
    for scale in served.scales:
        rope: dict[str, Any] = {"rope_type": method, "factor": scale, "original_max_position_embeddings": 64}
        if attention:
            rope["attention_factor"] = 1 + 0.04 * float(np.log(scale))
        cos, sin = of_transformers(with_rope(config, **rope), served.rows(scale))
        start = served.row_starts[scale]
        ours = tables[start : start + served.rows(scale)]
        torch.testing.assert_close(ours[:, :8], cos, rtol=0, atol=0)
        torch.testing.assert_close(ours[:, 8:], sin, rtol=0, atol=0)


def test_low_precision_is_rounded_once_at_the_end() -> None:
    rope, served = unscaled_rope(16, 10000.0, 64), scaling("yarn")
    exact = rotary_tables(rope, served, torch.float32)
    assert torch.equal(rotary_tables(rope, served, torch.bfloat16), exact.to(torch.bfloat16))


def test_a_default_device_does_not_move_the_arithmetic() -> None:
    with torch.device("meta"):
        assert rotary_tables(unscaled_rope(16, 10000.0, 64), scaling("yarn"), torch.float32).device.type == "cpu"


def test_rows_of_a_batch() -> None:
    target = torch.full((16,), 7, dtype=torch.int64)
    address = target.data_ptr()
    write_row_starts([target], np.array([64, 0, 192]), np.array([1, 4, 2]), 10)
    assert target.tolist() == [64, 0, 0, 0, 0, 192, 192, 0, 0, 0, 7, 7, 7, 7, 7, 7]
    assert target.data_ptr() == address


def test_rows_of_a_batch_of_the_v2_runner() -> None:
    """Two decoding requests and one reading its prompt, in an order of their own, in padded buffers."""
    target = torch.full((12,), 7, dtype=torch.int64)
    requests = torch.tensor([64, 192, 448, 0])
    batch = SimpleNamespace(
        num_reqs=3,
        num_tokens=6,
        num_tokens_after_padding=8,
        idx_mapping=torch.tensor([2, 0, 1, 3], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1, 5, 6, 6, 6], dtype=torch.int32),
    )
    spread_row_starts([target], requests, batch)
    assert target.tolist() == [448, 64, 64, 64, 64, 192, 0, 0, 7, 7, 7, 7]
