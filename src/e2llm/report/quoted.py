"""Figures printed in the E²-LLM paper (arXiv 2401.06951v3), quoted beside ours and marked as quoted.

Knows no Record. Percent, as printed, or perplexity; None: not printed. Overall LongBench figures are plain means over
14 English, 4 Chinese and all 18 tasks: the caption says macro-average, the numbers are not. Only those three stand
beside ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.report.formats import format_window

MARK = "quoted"


@dataclass(frozen=True)
class Quoted:
    """One printed row: what it is, and its values by set of tasks, or by window."""

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

TABLE_3_WINDOWS = (4096, 8192, 16384, 32768, 65536)


def _table_3(name: str, *perplexities: str) -> Quoted:
    columns = map(format_window, TABLE_3_WINDOWS)
    return Quoted(name, "Table 3", dict(zip(columns, perplexities, strict=False)))


TABLE_3 = (
    _table_3("Llama-2-7B", "2.92"),
    _table_3("Vicuna-v1.5-7B-16k (PI), scale 4", "3.48", "3.17", "3.95"),
    _table_3("LongChat-v1.5-7B-32k (PI), scale 8", "3.54", "3.18", "2.91", "2.73"),
    _table_3("E²-LLM-7B-16k, scale 4", "2.96", "2.71", "2.54"),
    _table_3("E²-LLM-7B-32k, scale 8", "2.99", "2.74", "2.56", "2.46"),
    _table_3("E²-LLM-7B-64k, scale 16", "3.06", "2.81", "2.62", "2.51", "2.56"),
    _table_3("Llama-2-13B", "2.78"),
    _table_3("E²-LLM-13B-16k, scale 4", "2.82", "2.59", "2.43"),
    _table_3("E²-LLM-13B-32k, scale 8", "2.85", "2.61", "2.44", "2.34"),
    _table_3("E²-LLM-13B-64k, scale 16", "2.91", "2.67", "2.49", "2.39", "2.44"),
)
"""Perplexity at a window (tokens, 4k to 64k); in each row all windows are read at the one scale."""
TABLE_3_NOTE = (
    f"“{MARK}”: printed in the E²-LLM paper, Table 3: arXiv Proof-pile, 128 documents of at least 64k tokens, sliding "
    "window, stride 256. Corpora and models differ from ours: the shape can be compared, the numbers cannot."
)
FIGURE_5 = (
    f"“{MARK}”: E²-LLM paper, Fig. 5, trained up to scale 20: perplexity stays good at 30 (120k) and degrades at 40 "
    "and 50. It is a curve without numbers, of another corpus and model than ours."
)
"""Scales never trained."""
