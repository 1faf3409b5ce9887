"""Windows as samples for training and evaluation.

Flows in: parts of a `Corpus`. Flows out: tensors, per sample and stacked. B = batch, R = window (tokens).

    input_ids      int64 (R,)
    labels         int64 (R,)  input_ids, or -100 where there is no loss; not shifted, transformers' models do that
    loss_weights   float32 (R,)  only where some tokens count for more in the loss (`data.planted_weight`)
    position_ids   int64 (R,)  only with document_mask: 0, 1, 2, ... from the start of each document
    sample_index   int         absolute number of the sample in the run; seeds whatever else is drawn for it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from e2llm.data.order import assign_sources, keyed_hash, number_within_source
from e2llm.data.parts import PackedWindows, Part, TextPart, Window
from e2llm.data.pieces import Jumps
from e2llm.data.planted import PlantedPart

Sample = dict[str, Any]
IGNORED = -100
"""Label of a token without loss."""
_ORDER = 0x6F72646572  # keeps these random numbers apart from others drawn from the same seed

logger = logging.getLogger(__name__)


class WindowDataset(Dataset[Sample]):
    """Samples start, start + 1, ..., start + num_samples - 1 of an endless run over `parts`, mixed by their weights.

    A sample is a function of (parts, window, seed, its absolute index): ranks, workers and resumed runs draw the same.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        window: int,
        num_samples: int,
        seed: int,
        start: int = 0,
        document_mask: bool = False,
        jumps: Callable[[int], Jumps] | None = None,
    ) -> None:
        """`jumps`: those of the sample with that absolute index, for text that jumps where its positions do."""
        if not parts:
            raise ValueError("data.sources is empty: name at least one source of text")
        self.start = start
        self.jumps = jumps
        self.num_samples = num_samples
        self.seed = seed
        self.document_mask = document_mask
        self.weighted = any(isinstance(part, PlantedPart) and part.answer_weight != 1 for part in parts)
        self._windows = [part.windows(window) for part in parts]
        for part, windows in zip(parts, self._windows, strict=True):
            if isinstance(part, TextPart):
                check_enough(part, window)
            if isinstance(windows, PackedWindows) and windows.num_unusable:
                if not len(windows):
                    raise ValueError(f"{part.name}: no assistant token in any window of {window}: raise data.window")
                logger.warning("%s: %d windows without assistant tokens are left out", part.name, windows.num_unusable)
        assigned = assign_sources([part.weight for part in parts], start + num_samples)
        self._sources = assigned[start:]
        self._numbers = number_within_source(assigned)[start:]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        source = int(self._sources[index])
        seed = keyed_hash(_ORDER, self.seed, source) >> 1
        jumps = None if self.jumps is None else self.jumps(self.start + index)
        window = self._windows[source].draw(int(self._numbers[index]), seed, jumps)
        sample = to_sample(window, self.start + index, document_mask=self.document_mask)
        if self.weighted:
            weights = np.ones(len(window.tokens), np.float32) if window.weights is None else window.weights
            sample["loss_weights"] = torch.from_numpy(weights)
        return sample


class HeldOutWindows(Dataset[Sample]):
    """Windows of the held-out documents: not overlapping, each once, always in the same order.

    With max_windows the sources share that number as evenly as they can, each giving windows spread over all it has.
    """

    def __init__(
        self, parts: Sequence[TextPart], *, window: int, max_windows: int | None = None, document_mask: bool = False
    ) -> None:
        self.document_mask = document_mask
        self._windows = [part.windows(window) for part in parts]
        counts = [len(windows) for windows in self._windows]
        if not sum(counts):
            tokens = ", ".join(f"{part.name}: {part.num_tokens}" for part in parts) or "none"
            raise ValueError(
                f"held-out text is too short for a window of {window} tokens ({tokens}): "
                "raise data.held_out_fraction, add documents, or lower data.window"
            )
        for part, count in zip(parts, counts, strict=True):
            if not count:
                logger.warning("%s: %d held-out tokens fill no window of %d", part.name, part.num_tokens, window)
        self.entries: list[tuple[int, int]] = []
        """(part, window of that part) of every sample."""
        for number, (count, taken) in enumerate(zip(counts, _share_out(counts, max_windows), strict=True)):
            self.entries += [(number, position * count // taken) for position in range(taken)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number, position = self.entries[index]
        return to_sample(self._windows[number][position], index, document_mask=self.document_mask)


def check_enough(part: TextPart, window: int) -> None:
    """ValueError if the part does not fill one window."""
    if part.num_tokens < window:
        raise ValueError(
            f"{part.name}: {part.num_tokens} tokens to train on (in {part.num_documents} documents), "
            f"a window needs {window}: add text or lower data.window"
        )


def to_sample(window: Window, sample_index: int, *, document_mask: bool) -> Sample:
    """A window as tensors. With document_mask no document's first token is a target: nothing before it may be seen."""
    labels = window.tokens.copy()
    if window.loss is not None:
        labels[~window.loss] = IGNORED
    sample: Sample = {"input_ids": torch.from_numpy(window.tokens), "sample_index": sample_index}
    if document_mask:
        labels[window.document_starts] = IGNORED
        positions = np.arange(len(labels), dtype=np.int64)
        begins = np.zeros_like(positions)
        begins[window.document_starts] = window.document_starts
        sample["position_ids"] = torch.from_numpy(positions - np.maximum.accumulate(begins))
    sample["labels"] = torch.from_numpy(labels)
    return sample


def collate(batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Samples -> tensors (B, R), and sample_index int64 (B,)."""
    return {key: torch.stack([torch.as_tensor(sample[key]) for sample in batch]) for key in batch[0]}


def _share_out(counts: list[int], limit: int | None) -> list[int]:
    """How many of `counts` to take: at most `limit` in all, as evenly as the counts allow."""
    if limit is None or limit >= sum(counts):
        return counts
    taken = [0] * len(counts)
    left = limit
    for position, number in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        taken[number] = min(counts[number], left // (len(counts) - position))
        left -= taken[number]
    return taken
