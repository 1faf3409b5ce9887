"""Fixtures of the tests with models: one thread, and flex attention that is not compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs flex attention's own Python implementation: transformers' masks and our tables with no compiler.

    Compiling it for a CPU takes half a minute a shape; `test_pitfalls.py` has one such test, marked slow.
    """
    from torch.nn.attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    def keep_plain(self: object, training: bool) -> None:
        self._compiled_flex_attention = flex_attention.flex_attention

    monkeypatch.setattr(WrappedFlexAttention, "__init__", keep_plain)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield
    WrappedFlexAttention._instance = None
