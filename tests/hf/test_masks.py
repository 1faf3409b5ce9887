"""Rows of one document: the model's answer, and whether it looks for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from transformers import masking_utils

from e2llm.hf.masks import one_document_a_row


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Position ids in which transformers looked for documents."""
    found: list[Any] = []
    own = masking_utils.find_packed_sequence_indices

    def search(position_ids: torch.Tensor) -> Any:
        found.append(position_ids)
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "gpt_neox"])
def test_the_answer_is_the_same_and_nobody_looks(family: str, searches: list[Any]) -> None:
    model, ids = tiny_model(family).eval(), token_ids(2, WINDOW // 2)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        assert searches, "transformers looks by itself"
        searches.clear()
        with one_document_a_row():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, own)
        assert not searches


def test_documents_are_seen_again_after_the_block(searches: list[Any]) -> None:
    model, ids = tiny_model("llama").eval(), token_ids(1, 32)
    positions = torch.arange(16).repeat(2)[None]
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with pytest.raises(RuntimeError), one_document_a_row():
            mixed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            raise RuntimeError
        assert not torch.allclose(mixed, own), "documents that share a row see each other within it"
        assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, own)


def test_versions_without_the_search_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with one_document_a_row():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")
    assert not hasattr(masking_utils, "find_packed_sequence_indices")


def test_flash_attention_looks_for_documents_in_batches_of_one_row_alone() -> None:
    """Why a recipe with both is refused for more: transformers hands a batch without a mask to the flash kernels whole,
    each row one document."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    positions = torch.arange(16).repeat(2)[None]
    assert _is_packed_sequence(positions, 1)
    assert not _is_packed_sequence(positions.expand(2, -1), 2)
    mask = masking_utils.flash_attention_mask(2, 32, 32, mask_function=masking_utils.causal_mask_function)
    assert mask is None
