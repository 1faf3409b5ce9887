"""Train the embedded base's byte-level BPE tokenizer on a sample of the corpus.

    python scripts/tiny_base/tokenizer.py --corpus build/tiny/corpus --out src/e2llm/assets/tiny-512

In: the files of corpus.py. Out: a folder that AutoTokenizer loads. 4096 entries, two of them special; every digit is a
token of its own (with or without the space before it), so that a number is copied digit by digit; a line break and the
indentation after it merge. Nothing is added to a text: no start token, no end token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"
# GPT-2's pattern with single digits and without English contractions.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAMPLE_BYTES = {"python.txt": 14_000_000, "prose.txt": 9_000_000}
PIECE_BYTES = 20_000


def sample(path: Path, num_bytes: int) -> list[str]:
    """Evenly spread pieces of the file, about num_bytes in all."""
    text = path.read_text(encoding="utf-8").replace(f"{END}\n", "")
    num_pieces = max(1, num_bytes // PIECE_BYTES)
    step = max(len(text) // num_pieces, PIECE_BYTES)
    return [text[i : i + PIECE_BYTES] for i in range(0, len(text), step)]


def train(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train([piece for name, size in SAMPLE_BYTES.items() for piece in sample(args.corpus / name, size)])
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens in {args.out}")


if __name__ == "__main__":
    main()
