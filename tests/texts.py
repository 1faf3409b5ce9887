"""A tokenizer of one token per character and documents of random text, for tests of inference and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
from architectures import VOCABULARY

from e2llm.evaluate.documents import Document


def character_tokenizer() -> Any:
    """Token id = ASCII code; 0, 1 and 2 are padding, begin and end of text. Adds no special token by itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code for code in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def random_documents(count: int, tokens: int, seed: int = 0) -> list[Document]:
    """Documents of random printable characters."""
    random = np.random.default_rng(seed)
    return [Document(f"{i}.txt", random.integers(40, 120, tokens).astype(np.int32)) for i in range(count)]


def byte_tokenizer(chat: bool = True) -> Any:
    """One token a byte of UTF-8, so that it can write everything; 0, 1 and 2 are special. With a plain chat template.

    Needs a vocabulary of BYTE_VOCABULARY. Adds no special token by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: code for code, letter in enumerate(alphabet, start=3)}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    if chat:
        found.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return found


BYTE_VOCABULARY = 3 + 256
