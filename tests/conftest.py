"""For every test: one thread (the machine's cores belong to all workers), quiet third parties, no network.

Set in the environment before torch is imported, so that tests that start their own Python inherit it and tests that
need no torch do not pay for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention by its own Python implementation: transformers' mask functions and our tables, no compiler.

    Compiling mask and kernel for a CPU takes up to half a minute a shape; `hf/test_pitfalls.py` has one such test,
    marked slow. Its backward pass is torch's plain one too, which torch forbids on a CPU.
    """
    from torch.nn.attention import flex_attention
    from transformers import masking_utils
    from transformers.integrations.flex_attention import WrappedFlexAttention

    def keep_plain(self: Any, training: bool) -> None:
        self._compiled_flex_attention = flex_attention.flex_attention

    def plain_mask(*arguments: Any, **named: Any) -> Any:
        return flex_attention.create_block_mask(*arguments, **(named | {"_compile": False}))

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *given: None)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", keep_plain)
    monkeypatch.setattr(masking_utils, "create_block_mask", plain_mask)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield
    WrappedFlexAttention._instance = None
