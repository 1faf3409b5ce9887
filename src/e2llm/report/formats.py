"""Numbers as people read them: 8192 tokens is 8k, a perplexity has three figures, a share has two decimals.

Flows in: numbers. Flows out: short text, the same in Markdown, HTML and figures.
"""

from __future__ import annotations

import re

_K = 1024

METRIC_NAMES = {"perplexity": "Perplexity", "retrieval": "Retrieval", "loss": "Loss"}
TASK_NAMES = {
    "pass_key": "pass key",
    "key_values": "key–value",
    "uuid_kv": "UUID key–value",
    "kv_pairs": "JSON key–value",
    "needle": "one needle",
    "multi_needle": "several needles",
}
PROTOCOL_NAMES = {
    "whole": "whole windows",
    "sliding": "sliding window",
    "calibration": "calibration, on documents of its own",
    "study": "study, on documents of its own",
    "position": "whole windows",
    "difference": "whole against sliding",
    "key_tokens": "tokens that need the context",
    "ruler": "RULER",
    "attention": "",
}


def format_window(tokens: float) -> str:
    """512 -> 512, 2048 -> 2k, 131072 -> 128k, 1048576 -> 1M; what is no multiple of 1024 stays as it is: 5,000."""
    tokens = round(tokens)
    if tokens >= _K * _K and tokens % (_K * _K) == 0:
        return f"{tokens // (_K * _K)}M"
    if tokens >= _K and tokens % _K == 0:
        return f"{tokens // _K}k"
    return format_count(tokens) if tokens >= 5 * _K else str(tokens)


def format_count(count: int) -> str:
    return f"{count:,}"


def format_scale(scale: float) -> str:
    """1.0 -> 1, 2.5 -> 2.5."""
    return f"{scale:g}"


def format_number(value: float) -> str:
    """Three figures where they matter: 4.37, 17.8, 244, 2,341, 1.2e+06."""
    size = abs(value)
    if size >= 999_999.5:
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def format_quantity(value: float, unit: str) -> str:
    """A number with its unit; bytes as GiB or MiB."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{format_number(value)} {unit}"


def format_value(metric: str, value: float) -> str:
    """A value in its metric's usual precision."""
    if metric == "loss":
        return f"{value:.3f}"
    return f"{value:.2f}" if metric == "retrieval" else format_number(value)


def slug(*parts: object) -> str:
    """Text that is safe as an HTML id: letters, digits and hyphens, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(str(part) for part in parts).lower()).strip("-") or "x"


def sentence_case(text: str) -> str:
    """The first letter large, all others as they are."""
    return text[:1].upper() + text[1:]


def join_words(*parts: str) -> str:
    """The parts that say something, comma-separated."""
    return ", ".join(part for part in parts if part)
