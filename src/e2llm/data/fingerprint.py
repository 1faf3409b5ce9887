"""What a token cache is keyed by: the content, the tokenizer and how the content was read.

Flows in: files and a tokenizer. Flows out: hexadecimal SHA-256 strings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.data.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_BYTES = 4 * 1024 * 1024


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_sha256(files: list[Path], advance: Advance) -> str:
    """SHA-256 over the bytes and extensions of `files` in order. Names and dates do not count."""
    parts = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while block := handle.read(_BLOCK_BYTES):
                digest.update(block)
                advance(len(block), 0)
        parts.append([file.suffix.lower(), digest.hexdigest()])
    return json_sha256(parts)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides which ids a text becomes. The tokenizer must be a fast one."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls change these two, and we tokenize with neither.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    return json_sha256(
        {
            "backend": backend,
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "eos_token_id": tokenizer.eos_token_id,
            "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
            "chat_template": tokenizer.chat_template,
        }
    )
