"""Tiny tokenizers, trained in the test session, and files of real-looking text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the a river tree house walks sees under over quickly blue green and or because of in stone light".split()


def sentences(seed: int, count: int) -> str:
    """`count` lines of words, the same for the same seed."""
    random = np.random.default_rng(seed)
    return "".join(" ".join(random.choice(WORDS, random.integers(3, 12)).tolist()) + ".\n" for _ in range(count))


def make_tokenizer(vocab_size: int = 400, template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([sentences(99, 200)], trainer)
    settings: dict[str, Any] = {"eos_token": EOS, "chat_template": template, "model_max_length": 32} | options
    return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with EOS, a ChatML template, and a model_max_length that every document exceeds."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like (as Llama 2's): a space mark before a text, BOS before that, and words joined freely."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<s>", "</s>"], initial_alphabet=["\n"], show_progress=False
    )
    core.train_from_iterator(sentences(98, 300).splitlines(), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes | list], Path]:
    """write(name, content): text, bytes, or a list of rows as JSONL; returns the path."""

    def write_file(name: str, content: str | bytes | list) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
