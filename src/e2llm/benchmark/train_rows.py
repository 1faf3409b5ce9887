"""From what contestants measured to the rows of a Record. Plain arithmetic on plain values; loads no torch.

Flows in: `Measurement`s, one for each contestant and round. Flows out: rows and examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from e2llm.benchmark.kernels import KernelTime, class_of, seconds_by_class
from e2llm.benchmark.shapes import DENSE_BF16_FLOPS, flops_per_token, shape_of
from e2llm.benchmark.train_contestants import FAR_KEYS, FULL_LENGTH, LIGER_COMPILE, LITGPT, PLAIN_POSITIONS, Contestant
from e2llm.records import make_row

Row = dict[str, Any]
RATIOS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ratio_to_hf", ("hf",)),
    ("ratio_to_hf_compile", ("hf-compile",)),
    ("ratio_to_hf_liger", ("hf-liger",)),
    ("ratio_to_hf_liger_compile", tuple(LIGER_COMPILE)),
    ("ratio_to_litgpt", (LITGPT,)),
    ("ratio_to_unsloth", ("unsloth",)),
    ("ratio_to_plain_positions", (PLAIN_POSITIONS,)),
)
"""Metric and the peers whose fastest it stands against."""
SPEED_UP = "ratio_to_one_gpu"
"""Tokens a second of all GPUs over those of one, each at its fastest batch size."""
LONGEST = 40
"""Kernels of a profile that are kept one by one."""


@dataclass(frozen=True)
class Measurement:
    """One contestant in one round."""

    contestant: Contestant
    round: int
    result: dict[str, Any]
    """As `benchmark.train_worker` wrote it."""

    @property
    def blocks(self) -> list[float]:
        """Seconds a step, the mean of each whole block of steps."""
        seconds, size = self.result["seconds"], self.contestant.block
        return [sum(seconds[i : i + size]) / size for i in range(0, len(seconds) - size + 1, size)]

    @property
    def tokens_per_second(self) -> float:
        """At the median block."""
        return tokens_per_step(self.contestant) / statistics.median(self.blocks)


def tokens_per_step(one: Contestant) -> int:
    """Of all GPUs together."""
    return one.windows_per_step * one.window


def rows_of(measured: Sequence[Measurement], *, figure1: bool = False) -> tuple[list[Row], list[Row]]:
    """Rows and examples of a Record. Where `e2llm` was profiled, so is its fastest batch size."""
    groups: dict[str, list[Measurement]] = {}
    for one in measured:
        groups.setdefault(one.contestant.name, []).append(one)
    rows = [row for group in groups.values() for row in _figures(group)]
    rows += _cost_rows(list(groups.values())) if figure1 else [*_speed_ratios(measured), *_memory_ratios(groups)]
    examples = [
        {**labels_of(one.contestant), "round": one.round, "block": number, "seconds_per_step": seconds}
        for one in measured
        for number, seconds in enumerate(one.blocks)
    ]
    profiled = [one for one in measured if one.result["kernels"]]
    if profiled:
        more = _profile(best_of(profiled)[0])
        rows, examples = rows + more[0], examples + more[1]
    return rows, examples


def labels_of(one: Contestant) -> Row:
    """What tells rows apart."""
    names = ("trainer", "shape", "window", "batch_size", "checkpointing", "gpus", "parallelism")
    return {name: getattr(one, name) for name in names}


def _figures(group: Sequence[Measurement]) -> list[Row]:
    """Speed, utilization and memory of one contestant over its rounds."""
    one, result = group[0].contestant, group[0].result
    labels, tokens = labels_of(one), tokens_per_step(one)
    blocks = [seconds for measurement in group for seconds in measurement.blocks]
    typical, low, high, n = statistics.median(blocks), min(blocks), max(blocks), len(blocks)
    rows = [
        make_row("seconds_per_step", typical, "s", n, **labels, low=low, high=high),
        make_row("tokens_per_second", tokens / typical, "tokens/s", n, **labels, low=tokens / high, high=tokens / low),
        make_row("seconds_per_million_tokens", 1e6 * typical / tokens, "s", n, **labels),
    ]
    if result["device"] == "cuda":
        shape = shape_of(one.shape)
        flops = flops_per_token(
            trained=result["trained"],
            frozen=result["frozen"],
            layers=shape.num_hidden_layers,
            width=shape.hidden_size,
            window=one.window,
        )
        share = flops * tokens / typical / DENSE_BF16_FLOPS / one.gpus
        rows.append(make_row("model_flops_utilization", share, "share", n, **labels))
    peaks = [float(m.result["peak_memory_bytes"]) for m in group]
    return [*rows, make_row("peak_memory_bytes", max(peaks), "bytes", len(peaks), **labels)]


def best_of(measured: Iterable[Measurement]) -> list[Measurement]:
    """The rounds of the trainer and batch size that were fastest; none of none."""
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for one in measured:
        groups.setdefault((one.contestant.trainer, one.contestant.batch_size), []).append(one)
    speed = {which: statistics.median(m.tokens_per_second for m in group) for which, group in groups.items()}
    return groups[max(speed, key=lambda which: speed[which])] if speed else []


def _speed_ratios(measured: Sequence[Measurement]) -> list[Row]:
    """Each trainer's speed against another's, both at their own best batch size: the median of the rounds' ratios.

    Against plain positions at the same batch size, the fastest that both have: only positions may differ.
    """
    kinds: dict[tuple[Any, ...], list[Measurement]] = {}
    for one in measured:
        who = one.contestant
        kinds.setdefault((who.window, who.trainer, who.gpus, who.parallelism), []).append(one)
    rows = []
    for (window, trainer, gpus, parallelism), all_mine in kinds.items():
        peers = [(metric, [(window, peer, gpus, parallelism) for peer in names]) for metric, names in RATIOS]
        peers += [(SPEED_UP, [(window, trainer, 1, "none")])] if gpus > 1 else []
        for metric, keys in peers:
            plain = keys[0][1] == PLAIN_POSITIONS
            itself = metric != SPEED_UP and any(trainer == key[1] for key in keys)
            all_theirs = [one for key in keys for one in kinds.get(key, [])]
            if itself or not all_theirs or (plain and trainer not in ("e2llm", FAR_KEYS)):
                continue
            mine = best_of(_as_large_as(all_theirs, all_mine) if plain else all_mine)
            theirs = {m.round: m for m in best_of(_as_large_as(mine, all_theirs) if plain else all_theirs)}
            pairs = [(m, theirs[m.round]) for m in mine if m.round in theirs]
            if not pairs:
                continue
            found = [m.tokens_per_second / other.tokens_per_second for m, other in pairs]
            peer = pairs[0][1].contestant
            labels = labels_of(mine[0].contestant) | {"peer": peer.trainer, "peer_batch_size": peer.batch_size}
            rows.append(make_row(metric, statistics.median(found), "ratio", len(found), **labels))
    return rows


def _as_large_as(some: Sequence[Measurement], others: Sequence[Measurement]) -> list[Measurement]:
    """Those of `others` whose batch size `some` have too."""
    sizes = {one.contestant.batch_size for one in some}
    return [one for one in others if one.contestant.batch_size in sizes]


def _memory_ratios(groups: dict[str, list[Measurement]]) -> list[Row]:
    """Peak memory against transformers' Trainer as it comes, at the same batch size and window."""
    peaks = {group[0].contestant: max(float(m.result["peak_memory_bytes"]) for m in group) for group in groups.values()}
    rows = []
    for one, peak in peaks.items():
        other = peaks.get(replace(one, trainer="hf"))
        if one.trainer != "hf" and other is not None:
            rows.append(make_row("memory_ratio_to_hf", peak / other, "ratio", 1, **labels_of(one)))
    return rows


def _cost_rows(groups: Sequence[Sequence[Measurement]]) -> list[Row]:
    """What it costs to serve every full-length window that was measured: one run of ours against one run for each.

    Seconds for a million tokens of training each; runs of as many tokens are compared. `serves` names the windows;
    full length trains at each of them, so it has no one `window`.
    """
    seconds: dict[str, dict[int, float]] = {}
    for group in groups:
        one = group[0].contestant
        typical = statistics.median(s for m in group for s in m.blocks)
        seconds.setdefault(one.trainer, {})[one.window] = 1e6 * typical / tokens_per_step(one)
    full = seconds.get(FULL_LENGTH, {})
    if not full or "e2llm" not in seconds:
        return []
    shape = groups[0][0].contestant.shape
    serves = " ".join(str(window) if window % 1024 else f"{window // 1024}k" for window in sorted(full))
    common: Row = {"shape": shape, "gpus": 1, "parallelism": "none", "serves": serves}
    total, metric = sum(full.values()), "serving_seconds_per_million_tokens"
    rows = [make_row(metric, total, "s", len(full), trainer=FULL_LENGTH, window=None, **common)]
    for window, own in sorted(seconds["e2llm"].items()):
        labels = {"trainer": "e2llm", "window": window, **common}
        rows.append(make_row(metric, own, "s", 1, **labels))
        rows.append(make_row("cost_ratio_to_full_length", own / total, "ratio", 1, **labels))
    return rows


def _profile(measurement: Measurement) -> tuple[list[Row], list[Row]]:
    """Device seconds a step by class of kernel; the longest kernels and gaps as examples."""
    one, kernels = measurement.contestant, kernels_of(measurement.result)
    typical = statistics.median(measurement.blocks)
    rows = [
        make_row("device_seconds_per_step", value, "s", one.profile, kernels=kind, **labels_of(one))
        for kind, value in seconds_by_class(kernels, typical).items()
    ]
    examples = [
        {**labels_of(one), "kernel": k.name, "kernels": k.kind, "device_seconds_per_step": k.seconds, "calls": k.calls}
        for k in kernels[:LONGEST]
    ]
    examples += [
        {**labels_of(one), "gap_seconds": gap["seconds"], "after": gap["after"], "before": gap["before"]}
        for gap in measurement.result["gaps"]
    ]
    return rows, examples


def kernels_of(result: dict[str, Any]) -> list[KernelTime]:
    """A result's kernels, classed anew: patterns may have been added since."""
    return [KernelTime(k["name"], class_of(k["name"]), k["seconds"], k["calls"]) for k in result["kernels"]]
