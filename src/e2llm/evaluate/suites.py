"""Sets of protocols and sizes by name: what `e2llm evaluate --suite` stands for. No torch.

Flows in: a suite's name and the settings that a user gave. Flows out: settings; what the user gave is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e2llm.evaluate.config import RULER

SUITES: dict[str, dict[str, Any]] = {
    "paper": {"protocols": ("sliding", "difference"), "stride": 256, "max_strides": 64},
    "ruler": {"protocols": RULER},
    "context": {"protocols": ("whole", "position", "key_tokens")},
    "needles": {"protocols": ("pass_key", "uuid_kv", "needle", "multi_needle", "kv_pairs"), "prompts": 110},
    "attention": {"protocols": ("attention",), "windows": (8192, 16384, 32768, 65536), "prompts": 10},
    "smoke": {
        "protocols": (
            *("whole", "sliding", "position", "difference", "key_tokens"),
            *("pass_key", "uuid_kv", "needle", "multi_needle", "kv_pairs", "attention"),
            *(name for name in RULER if not name.startswith("qa_")),
        ),
        "windows": (1024, 2048),
        "prompts": 2,
        "max_strides": 2,
        "max_documents": 1,
    },
}
"""Name -> defaults. paper: the paper's perplexity, and how whole windows differ from it; ruler: the thirteen kinds (two
of them over documents that `qa` names); context: does the model use its context; smoke: everything once, in a minute.
`choice` (whether choosing the scale matters) runs several methods: `choice.py`."""

NAMES = (*SUITES, "choice")


def with_suite(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a suite where the user gave none. Questions over documents are asked only where a file is named; the
    kinds that are not asked stand in `left_out`."""
    if name not in SUITES:
        raise ValueError(f"suite = {name!r}: choose one of {', '.join(NAMES)}")
    found = SUITES[name] | dict(given)
    if "protocols" not in given:
        named = set(given.get("qa", {}))
        found["left_out"] = tuple(p for p in found["protocols"] if p in ("qa_1", "qa_2") and p not in named)
        found["protocols"] = tuple(p for p in found["protocols"] if p not in found["left_out"])
    return found
