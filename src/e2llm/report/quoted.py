"""Figures printed in the E²-LLM paper (arXiv 2401.06951v3), quoted beside ours and marked as quoted.

Knows no Record. Overall LongBench figures are plain means over 14 English, 4 Chinese and all 18 tasks: the caption says
macro-average, the numbers are not. Only those three stand beside ours. Percent, as printed; None: not printed.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "quoted"


@dataclass(frozen=True)
class Quoted:
    """One printed row: what it is, and its values by set of tasks."""

    name: str
    where: str
    values: dict[str, str]


def _overall(name: str, where: str, en14: str, zh4: str, all18: str) -> Quoted:
    return Quoted(name, where, {"en14": en14, "zh4": zh4, "all18": all18})


LONGBENCH = (
    _overall("GPT-3.5-Turbo-16k", "Tables 1–2", "44.60", "33.78", "42.19"),
    _overall("Llama2-7B-chat-4k*", "Tables 1–2", "35.17", "15.45", "20.79"),
    _overall("E²-LLM-Llama2-7B-16k", "Tables 1–2", "41.26", "26.70", "38.03"),
    _overall("E²-LLM-Llama2-7B-32k", "Tables 1–2", "41.74", "30.23", "39.18"),
    _overall("Llama2-13B-chat-4k", "Tables 1–2", "37.87", "24.38", "34.87"),
    _overall("PI-Llama2-13B-16k", "Tables 1–2", "40.88", "26.35", "37.65"),
    _overall("E²-LLM-Llama2-13B-16k", "Tables 1–2", "44.73", "28.56", "41.13"),
    _overall("E²-LLM-Llama2-13B-32k", "Tables 1–2", "44.55", "31.93", "41.74"),
    Quoted("13B-32k without offset", "Table 4", {"all18": "39.44"}),
    Quoted("13B-32k without scale (g = 2, R = 8k)", "Table 4", {"all18": "38.77"}),
    Quoted("13B-32k, g_max 5", "Table 5", {"all18": "40.12"}),
    Quoted("13B-32k, g_max 10", "Table 5", {"all18": "41.15"}),
    Quoted("13B-32k, g_max 20", "Table 5", {"all18": "41.74"}),
    Quoted("13B-32k, g_max 30", "Table 5", {"all18": "41.51"}),
)
"""Overall figures of Tables 1 and 2, 4 and 5. *: its ZH and All, as printed, disagree with its own cells."""

SHORT = (
    Quoted("Llama2-7B", "Table 7", {"average of 8": "53.7", "HellaSwag": "73.0"}),
    Quoted("E²-LLM-7B at the 32k scale", "Table 7", {"average of 8": "54.8", "HellaSwag": "71.9"}),
    Quoted("E²-LLM-7B at the 64k scale", "Table 7", {"average of 8": "54.0", "HellaSwag": "70.9"}),
)
"""Zero-shot at the base window; the paper does not say which accuracy, so these stand in a table of their own."""
SHORT_TASKS = frozenset(
    ("piqa", "wsc", "wsc273", "hellaswag", "social_iqa", "siqa", "winogrande", "race", "race_middle", "nq_open")
)
"""The harness' names of what Table 7 measures: beside other tasks it is not quoted."""
SHORT_COLUMNS = ("average of 8", "HellaSwag")
SHORT_AVERAGED = ("piqa", "wsc273", "hellaswag", "social_iqa", "winogrande", "race", "nq_open")
"""What our own average is of: the harness has no RACE-M, the eighth."""
