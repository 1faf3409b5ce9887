"""Rows that hold one document each: transformers need not look for several.

Flows in: nothing. Flows out: a block in which the mask makers of transformers take every row for one document. Knows no
model and no scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

_SEARCH = "find_packed_sequence_indices"


@contextmanager
def one_document_a_row() -> Iterator[None]:
    """Within the block no forward looks for documents that share a row.

    Where a batch has no attention mask, transformers compares the position ids of neighbours and asks the device for
    the answer: at the start of every forward the host waits until the step before is done, and the device then waits
    for the host. Only for batches without position ids of their own: documents that do share a row would see each
    other. Versions of transformers without that search are left as they are.
    """
    own: Any = getattr(masking_utils, _SEARCH, None)
    if own is None:
        yield
        return
    setattr(masking_utils, _SEARCH, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _SEARCH, own)
