"""Which documents are held out for the evaluation loss.

Flows in: hashes of the documents' contents. Flows out: a flag per document. Knows no text and no token.
The choice hangs on (seed, content) alone: equal documents always go together, in one source or across sources, and a
document keeps its side when others are added (but for the one that a small source is made to hold out).
"""

from __future__ import annotations

import numpy as np


def choose_held_out(hashes: list[np.ndarray], *, fraction: float, seed: int) -> list[np.ndarray]:
    """Per source: bool (D,), True where the document is held out. hashes: uint64 (D,) per source.

    A source with at least two different documents holds out at least one and keeps at least one. ValueError where a
    source keeps nothing because another holds out copies of its documents.
    """
    if fraction == 0 or not hashes:
        return [np.zeros(len(source), dtype=bool) for source in hashes]
    chosen = [_choose(source, fraction, seed) for source in hashes]
    copies = np.unique(np.concatenate([source[held] for source, held in zip(hashes, chosen, strict=True)]))
    chosen = [np.isin(source, copies) for source in hashes]
    for number, held in enumerate(chosen):
        if held.all():
            raise ValueError(
                f"data.sources[{number}]: every document of it is also in another source and held out there: "
                "drop one of the two sources, or set data.held_out_fraction = 0"
            )
    return chosen


def _choose(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    scores = _scramble(hashes, seed)
    held = scores < np.uint64(int(fraction * 2**64))
    if not held.any():
        held = scores == scores.min()
    if held.all():
        held = scores < scores.max()  # none, if all documents are equal
    return held


def _scramble(hashes: np.ndarray, seed: int) -> np.ndarray:
    """uint64 -> uint64, one to one and unlike the input: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    mixed = np.asarray(hashes, dtype=np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
