"""Training windows made of synthetic passages and natural text, built by all cores before training starts.

In: the natural token streams, a tokenizer, a seed. Out: (windows, length) uint16. A window holds one or more passages,
each followed by the end token, and natural text before or after them, so that what is asked and where it was stated lie
at every distance that the window has. Window i depends on (seed, i) alone.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

import numpy as np

from e2llm.data.synthetic import copies, key_values, plant

PLANTED, KEY_VALUES = 0.55, 0.20  # the rest are copies
MAX_HOST_TOKENS = 420
PYTHON_HOSTS = 0.6


@dataclass(frozen=True)
class Source:
    """What a worker needs; the token streams are shared with it by fork."""

    python: np.ndarray  # (tokens,) uint16
    prose: np.ndarray
    tokenizer: object
    length: int
    seed: int


def _slice(source: Source, rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    stream = source.python if rng.random() < PYTHON_HOSTS else source.prose
    start = int(rng.integers(len(stream) - num_tokens))
    return stream[start : start + num_tokens]


def _passage(source: Source, rng: np.random.Generator, room: int) -> list[int]:
    """Tokens of one passage with its end token; it may be longer than `room`."""
    kind, seed, index = rng.random(), int(rng.integers(1 << 31)), int(rng.integers(1 << 31))
    if kind < PLANTED:
        # Half of the hosts nearly fill the window: long distances are the rare ones.
        longest = max(min(MAX_HOST_TOKENS, room - 60), 31)
        shortest = longest // 2 if rng.random() < 0.5 else 30
        host = _slice(source, rng, int(rng.integers(min(shortest, longest - 1), longest)))
        text = plant(seed, index, source.tokenizer.decode(host.tolist(), skip_special_tokens=True))
    else:
        text = key_values(seed, index) if kind < PLANTED + KEY_VALUES else copies(seed, index)
    return [*source.tokenizer.backend_tokenizer.encode(text).ids, 0]


def build_window(source: Source, index: int) -> np.ndarray:
    """(length,) uint16: passages that fit whole, natural text in the rest, before or after them."""
    rng = np.random.default_rng((source.seed, index))
    tokens: list[int] = []
    for _ in range(5):
        room = source.length - len(tokens)
        if room < 110:
            break
        passage = _passage(source, rng, room)
        if len(passage) <= room:
            tokens += passage
    rest = _slice(source, rng, source.length - len(tokens))
    passages = np.array(tokens, dtype=np.uint16)
    if len(rest) and rng.random() < 0.5:
        return np.concatenate([rest[:-1], [np.uint16(0)], passages])
    return np.concatenate([passages, rest])


_source: Source | None = None  # set before the fork, read by the workers


def _build_range(bounds: tuple[int, int]) -> np.ndarray:
    return np.stack([build_window(_source, i) for i in range(*bounds)])


def build_windows(source: Source, num_windows: int) -> np.ndarray:
    """(num_windows, length) uint16 on all cores. Call before CUDA is touched: the workers are forked."""
    global _source
    _source = source
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked tokenizer must not start threads
    step = 250
    ranges = [(i, min(i + step, num_windows)) for i in range(0, num_windows, step)]
    num_workers = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        return np.concatenate(pool.map(_build_range, ranges, chunksize=1))
