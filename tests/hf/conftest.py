"""Fixtures of the tests with models: one thread, and flex attention that is not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention by its own Python implementation: transformers' mask functions and our tables, no compiler.

    Compiling mask and kernel for a CPU takes up to half a minute a shape; `test_pitfalls.py` has one such test,
    marked slow.
    """
    from torch.nn.attention import flex_attention
    from transformers import masking_utils
    from transformers.integrations.flex_attention import WrappedFlexAttention

    def keep_plain(self: Any, training: bool) -> None:
        self._compiled_flex_attention = flex_attention.flex_attention

    def plain_mask(*arguments: Any, **named: Any) -> Any:
        return flex_attention.create_block_mask(*arguments, **(named | {"_compile": False}))

    monkeypatch.setattr(WrappedFlexAttention, "__init__", keep_plain)
    monkeypatch.setattr(masking_utils, "create_block_mask", plain_mask)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield
    WrappedFlexAttention._instance = None
