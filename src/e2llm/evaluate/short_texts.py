"""Which samples of a harness task the tokenizer cannot write: those are left out, for a score there says nothing.

Flows in: a task of the harness, a tokenizer. Flows out: the number of each such sample and what is lost of it.
"""

from __future__ import annotations

import functools
from typing import Any

from e2llm.evaluate.writable import REMEDY, check_writes, encode


def unwritable(task: Any, tokenizer: Any, *, limit: int | None, seed: int) -> dict[int, str]:
    """Number of a sample (of the first `limit`) -> why it cannot be asked: of its context or one of its continuations
    too many characters do not come back from the tokenizer. A chat template adds nothing that could be lost."""

    @functools.cache
    def reason(text: str) -> str:
        try:
            check_writes(tokenizer, text, encode(tokenizer, text))
        except ValueError as error:
            return f"{error}; {REMEDY}"
        return ""

    task.set_fewshot_seed(seed)  # examples before the question are drawn as they are when it is asked
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    found: dict[int, str] = {}
    for instance in task.instances:
        reasons = (reason(part) for part in instance.args if isinstance(part, str))
        why = "" if instance.doc_id in found else next(filter(None, reasons), "")
        if why:
            found[instance.doc_id] = why
    return found
