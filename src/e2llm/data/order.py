"""Which source and which window a sample is: functions of (seed, sample index) alone, so that no state needs saving.

Flows in: weights, counts and seeds. Flows out: indices. Knows no data.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

_FEISTEL_ROUNDS = 4
_SHARE_SLACK = 1e-9


def keyed_hash(*values: int) -> int:
    """Integers in [-2**63, 2**63) -> an integer in [0, 2**64)."""
    packed = struct.pack(f"<{len(values)}q", *values)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def permute(index: int, count: int, key: int) -> int:
    """Where `index` goes in the permutation of range(count) named by `key`, without storing it.

    A Feistel network is one to one on a power of four (Luby and Rackoff 1988); indices that it sends beyond `count` are
    sent on until they are inside (cycle walking, Black and Rogaway 2002), fewer than four steps on average.
    """
    assert 0 <= index < count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = key % 2**63
    while True:
        left, right = index >> half, index & mask
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (keyed_hash(key, turn, right) & mask)
        index = left << half | right
        if index < count:
            return index


def assign_sources(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """Source of each sample, int16 (num_samples,). After any n samples, source s had n * share within 1 - 1/(2S - 2).

    Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): of the sources that are due, take the
    one that would be late first. The first n entries do not depend on num_samples.
    """
    sources = range(len(weights))
    assigned = np.zeros(num_samples, dtype=np.int16)
    if len(weights) == 1:
        return assigned
    total = sum(weights)
    shares = [weight / total for weight in weights]
    bound = 1 - 1 / (2 * len(weights) - 2)
    counts = [0] * len(weights)
    for n in range(1, num_samples + 1):
        due = (s for s in sources if n * shares[s] - counts[s] >= 1 - bound - _SHARE_SLACK)
        chosen = min(due, key=lambda s: (counts[s] + bound) / shares[s])
        assigned[n - 1] = chosen
        counts[chosen] += 1
    return assigned


def number_within_source(assigned: np.ndarray) -> np.ndarray:
    """For each sample, how many samples before it have the same source: int64 (num_samples,)."""
    numbers = np.zeros(len(assigned), dtype=np.int64)
    for source in np.unique(assigned):
        of_source = assigned == source
        numbers[of_source] = np.arange(of_source.sum())
    return numbers
