"""The cache by the name that this version of transformers gives it."""

from __future__ import annotations

import logging

import pytest
import torch
from architectures import tiny_model, token_ids
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from e2llm.hf.cache import cache_argument, cache_of


def test_a_cache_goes_in_and_comes_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, logger="transformers"), torch.no_grad():
        ids = token_ids(1, 12)
        first = model(input_ids=ids[:, :8], **cache_argument(model, None))
        second = model(input_ids=ids[:, 8:], **cache_argument(model, cache_of(first)))
        whole = model(input_ids=ids).logits[:, 8:]
    torch.testing.assert_close(second.logits, whole, atol=1e-5, rtol=1e-5)
    assert isinstance(cache_of(second), DynamicCache) and cache_of(second).get_seq_length() == 12
    assert not caplog.records


def test_an_output_of_the_older_name() -> None:
    cache = DynamicCache()
    found = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1), past_key_values=cache)
    assert cache_of(found) is cache
