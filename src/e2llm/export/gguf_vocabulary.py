"""A tokenizer in GGUF's words, and how well it fits.

Flows in: a transformers tokenizer backed by byte-level BPE. Flows out: a `Vocabulary`: tokens, kinds, merges, special
ids, and llama.cpp's name for the way text is cut before the merges (`tokenizer.ggml.pre`). llama.cpp knows a fixed set
of cuttings, by name; we find the one that gives this tokenizer's tokens by trying them on texts of many kinds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_CASED_REST = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Cutting:
    """One of llama.cpp's pre-tokenizers (llm_tokenizer_bpe in llama-vocab.cpp)."""

    patterns: tuple[str, ...]
    """Regular expressions applied one after the other, each to the pieces that the last one left."""
    ignores_merges: bool = False
    """Whether a piece that is a token is taken whole, without merging."""


CUTTINGS = {
    "gpt-2": Cutting((_GPT2,)),
    "smollm": Cutting((r"\p{N}", _GPT2)),
    "llama-bpe": Cutting((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL,), True),
    "qwen2": Cutting((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL,)),
    "smaug-bpe": Cutting((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL,)),
    "qwen35": Cutting(
        (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Cutting((_CASED + "|" + _CASED_REST + r"|\p{N}|" + _SLASHED,), True),
    "gpt-4o": Cutting((_CASED + _CONTRACTIONS + "?|" + _CASED_REST + _CONTRACTIONS + r"?|\p{N}{1,3}|" + _SLASHED,)),
    "deepseek-coder": Cutting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "default": Cutting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""tokenizer.ggml.pre -> how it cuts."""

SAMPLES = (
    "It's 1234567 o'clock, isn't it? They'll say WE'VE 3 apples; I'D pay $12.50 (or 7,5 €)!\n\n\tNext   line\r\n  end ",
    "def f(x, y=10):\n    return {'key': [x[0], \"a\\n\"], 'n': 0x1F}  # comment's end\n\n\nclass A_b2:\n\tpass\n",
    "Ünïcödé straße Привет мир, 你好世界 1２3 ①½ हिन्दी 한국어 日本語テキスト 🙂👍🏽 e\u0301\u00a0x\u200b\u3000y",
    "https://example.org/a/b?c=1&d=%20#e <tag attr='v'>x</tag> **bold** __init__ --flag=3 C++ ... ''' 'quot' x'y 'tis",
    "    \n   \n\n 42\n007 3.14159 1e-5 2024-01-31T12:00:00Z ABCdefGHI camelCase HTTPServer iPhone McDonald's",
    "it'sum y'two don'table x='sum' f('test')\n'demo' 'll\n'refer'",
)


@dataclass(frozen=True)
class Vocabulary:
    """Everything below `tokenizer.`."""

    tokens: list[str]
    kinds: list[int]
    """gguf.TokenType of each token."""
    merges: list[str]
    pre: str
    differing: int
    """Tokens of the sample texts, of `sampled`, where llama.cpp's cutting gives others than the tokenizer; 0: none."""
    sampled: int
    special: dict[str, int]
    """bos, eos, unknown, padding -> token id."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None
    normalizes: bool
    """Whether the tokenizer composes characters (NFC) first, which llama.cpp does not."""

    def warning(self) -> str | None:
        """What to say where no cutting fits."""
        if not self.differing:
            return None
        why = "the tokenizer composes characters (NFC), llama.cpp does not" if self.normalizes else "none fits exactly"
        return (
            f"tokenizer.ggml.pre = {self.pre!r}: the nearest of llama.cpp's ways to cut text gives other tokens at "
            f"{self.differing} of {self.sampled} places of the sample texts ({why}). llama.cpp will read some texts "
            "otherwise than the model was trained on: give it token ids, or serve with another runtime"
        )


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """`size`: rows of the embedding; tokens beyond the tokenizer's are filled in as unused.

    Raises ValueError for a tokenizer that is not byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    raw = json.loads(backend.to_str()) if backend is not None else {}
    kind = raw.get("model", {}).get("type")
    if kind != "BPE" or raw["model"].get("byte_fallback") or "ByteLevel" not in json.dumps(raw.get("pre_tokenizer")):
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} ({kind or 'not a fast tokenizer'}) is not byte-level BPE, the one "
            "kind that is written to GGUF; use --to hf and llama.cpp's own convert_hf_to_gguf.py on the folder"
        )
    if raw.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError(f"tokenizer.normalizer = {raw['normalizer']}: llama.cpp's BPE has none; use --to hf")
    tokens, kinds = _tokens(raw, size)
    pre, differing, sampled = find_cutting(backend, raw)
    probe = tokenizer("a").input_ids
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=[m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
        pre=pre,
        differing=differing,
        sampled=sampled,
        special={name: int(token) for name, token in special.items() if token is not None},
        adds_bos=tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id,
        adds_eos=tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id,
        chat_template=getattr(tokenizer, "chat_template", None),
        normalizes=raw.get("normalizer") is not None,
    )


def _tokens(raw: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id: dict[int, tuple[str, int]] = {
        token: (text, int(TokenType.NORMAL)) for text, token in raw["model"]["vocab"].items()
    }
    for added in raw["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], int(kind))
    if max(by_id) >= size:
        raise ValueError(f"tokenizer: token id {max(by_id)} lies outside the model's vocabulary of {size}")
    rows = [by_id.get(token, (f"[UNUSED{token}]", int(TokenType.UNUSED))) for token in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def find_cutting(backend: Any, raw: dict[str, Any]) -> tuple[str, int, int]:
    """(name of the cutting with the fewest differing tokens, how many, of how many tokens)."""
    texts = [*SAMPLES, Path(str(argparse.__file__)).read_text(encoding="utf-8")]
    own = [_placed(backend, text) for text in texts]
    best, fewest = "", -1
    ignores = bool(raw["model"].get("ignore_merges"))
    # Several may fit the samples; among them one that merges as the tokenizer does.
    for name, cutting in sorted(CUTTINGS.items(), key=lambda item: item[1].ignores_merges != ignores):
        core = cut_like_llamacpp(raw, cutting)
        differing = sum(len(tokens - _placed(core, text)) for tokens, text in zip(own, texts, strict=True))
        if fewest < 0 or differing < fewest:
            best, fewest = name, differing
        if not differing:
            break
    return best, fewest, sum(map(len, own))


def _placed(core: Any, text: str) -> set[tuple[int, int, int]]:
    """Tokens of `text` with their places: (first character, end, id)."""
    found = core.encode(text, add_special_tokens=False)
    return {(start, end, token) for (start, end), token in zip(found.offsets, found.ids, strict=True)}


def cut_like_llamacpp(raw: dict[str, Any], cutting: Cutting) -> Any:
    """The tokenizer of `raw` (a parsed tokenizer.json) with llama.cpp's cutting in place of its own."""
    from tokenizers import Tokenizer

    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in cutting.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    changed = {
        **raw,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "model": {**raw["model"], "ignore_merges": cutting.ignores_merges},
    }
    return Tokenizer.from_str(json.dumps(changed))
