"""Tokenise the corpus into the few files that travel to the machine with the GPU.

    python scripts/tiny_base/prepare.py --corpus build/tiny/corpus --tokenizer src/e2llm/assets/tiny-512 \\
        --out .carry/tiny

Out: python.bin.xz and prose.bin.xz (documents in a shuffled order, one uint16 a token, token 0 after each document),
held_out_stdlib.bin.xz and held_out_prose.bin.xz (the same, in order), sources.json with the token counts added.
"""

from __future__ import annotations

import argparse
import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from e2llm.data.stdlib_files import stdlib_documents

SEPARATOR = "<|endoftext|>\n"
# Two-byte units; a dictionary as large as the larger part of a file, because packages repeat themselves.
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "lc": 2, "pb": 1, "dict_size": 1 << 26}]
DOCUMENTS_PER_BATCH = 64


def tokenise(documents: list[str], tokenizer) -> np.ndarray:
    """(tokens,) uint16: the documents one after the other, each followed by the end token."""
    parts = []
    for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + DOCUMENTS_PER_BATCH])
        parts += [np.array([*e.ids, tokenizer.eos_token_id], dtype=np.uint16) for e in encoded]
    return np.concatenate(parts)


def documents_of(path: Path) -> list[str]:
    return [d for d in path.read_text(encoding="utf-8").split(SEPARATOR) if d.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rng = np.random.default_rng(args.seed)
    parts = {name: documents_of(args.corpus / f"{name}.txt") for name in ("python", "prose", "held_out_prose")}
    for name in ("python", "prose"):
        parts[name] = [parts[name][i] for i in rng.permutation(len(parts[name]))]
    parts["held_out_stdlib"] = [text for _, text in stdlib_documents(held_out=True)]
    record = json.loads((args.corpus / "sources.json").read_text())
    record["tokens"] = {}
    with ThreadPoolExecutor() as pool:  # compression runs beside the next part's tokenisation
        for name, documents in parts.items():
            tokens = tokenise(documents, tokenizer)
            record["tokens"][name] = len(tokens)
            pool.submit(write_xz, args.out / f"{name}.bin.xz", tokens)
            print(f"{name}: {len(documents)} documents, {len(tokens)} tokens", flush=True)
    (args.out / "sources.json").write_text(json.dumps(record, indent=1) + "\n")
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {total / 1e6:.1f} MB")


def write_xz(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), format=lzma.FORMAT_XZ, filters=XZ_FILTERS))


if __name__ == "__main__":
    main()
