"""The constants of the plan from measured runs, and how far the plan is from runs that they were not found by.

Flows in: measured runs as plain values. Flows out: `Shares`, factors, ratios of planned to measured. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from e2llm.config import Recipe
from e2llm.plan.frozen import fetched_bytes, frozen_seconds, uses_of
from e2llm.plan.memory import packed_parameters, training_memory
from e2llm.plan.shape import Shape
from e2llm.plan.speed import PLAIN, SHARES, Gpu, Shares, is_known, seconds_per_token, work_of
from e2llm.plan.step import beside_bytes, step_of

_PRODUCTS = ("matrix products",)
_ATTENTION = ("attention forward", "attention backward")
_OPTIMIZER = ("optimizer",)
FACTORS = np.arange(1.0, 2.51, 0.05)
"""What `fit_recomputed` tries."""


@dataclass(frozen=True)
class Run:
    """One measured run."""

    name: str
    family: str
    """Of its shape: what is held out together."""
    shape: Shape
    recipe: Recipe
    gpu: Gpu
    gpus: int
    tokens_per_second: float
    """Over all GPUs."""
    peak_bytes: float
    """Of one GPU."""
    kernels: Mapping[str, float] = field(default_factory=dict)
    """Seconds a step by class of kernel, idle time too; empty where it was not profiled."""

    def speed_ratio(self, shares: Shares = SHARES) -> float | None:
        """Planned tokens a second relative to measured ones; None where the plan names no speed."""
        step = step_of(self.shape, self.recipe, self.gpu, self.gpus, shares)
        return None if step is None else step.tokens_per_second / self.tokens_per_second

    def memory_ratio(self, recomputed: float | None = None) -> float:
        """Planned peak relative to the measured one."""
        parts = training_memory(self.shape, self.recipe, self.gpus, recomputed)
        return sum(parts.values()) / self.peak_bytes


def fit(runs: Sequence[Run]) -> Shares:
    """Least squares of relative differences over the runs on one GPU: whole steps, and the parts of profiled ones.

    Steps alone would not do: what a layer's products and its traffic cost rise together from shape to shape. Raises
    ValueError where the runs do not tell the three constants apart.
    """
    rows, values = [], []
    for run in runs:
        if run.gpus > 1 or not is_known(run.recipe, run.shape) or frozen_seconds(run.shape, run.recipe, run.gpu):
            continue
        windows, _, copied, updated = beside_bytes(run.shape, run.recipe, run.gpus)
        tokens = windows * run.recipe.data.window
        work = work_of(run.shape, run.recipe)
        peak, bandwidth = run.gpu.bfloat16_flops, run.gpu.bytes_per_second
        parts = np.array([work.products / peak, work.attention / peak, work.moved / bandwidth]) * tokens
        seconds = tokens / run.tokens_per_second
        rows.append(parts / seconds)
        values.append(1 - (copied + updated) / bandwidth / seconds)
        if run.kernels:
            whole = sum(run.kernels.values())
            products = sum(run.kernels[name] for name in _PRODUCTS)
            attention = sum(run.kernels[name] for name in _ATTENTION)
            rest = whole - products - attention - sum(run.kernels.get(name, 0.0) for name in _OPTIMIZER)
            rows += list(np.diag(parts) / whole)
            values += [products / whole, attention / whole, rest / whole]
    found, _, rank, _ = np.linalg.lstsq(np.array(rows).reshape(-1, 3), np.array(values), rcond=None)
    if rank < 3 or min(found) <= 0:
        raise ValueError(f"runs: {len(rows)} equations do not tell products, attention and traffic apart; add shapes")
    return Shares(products=float(1 / found[0]), attention=float(1 / found[1]), moves=float(found[2]))


def fit_recomputed(runs: Sequence[Run]) -> float:
    """The factor of `memory.RECOMPUTED` (or of adapters) by which the runs' peaks are met best; 1, what a layer keeps,
    where it does not move any of them by a hundredth."""
    ratios = np.array([[run.memory_ratio(float(factor)) for run in runs] for factor in FACTORS])
    if not len(runs) or np.ptp(ratios, axis=0).max() < 0.01:
        return 1.0
    return float(FACTORS[np.square(ratios - 1).sum(axis=1).argmin()])


def fit_unpacked(runs: Sequence[Run]) -> float:
    """`frozen.UNPACKED`: bytes a 4-bit weight and use, the mean of what the runs took beyond the plan without it."""
    found = []
    for run in runs:
        weights = packed_parameters(run.shape, run.recipe) * uses_of(run.recipe)
        if weights:
            found.append(_beyond(run) * run.gpu.bytes_per_second / weights)
    return float(np.mean(found))


def fit_plain(runs: Sequence[Run]) -> float:
    """`speed.PLAIN`: least squares of relative differences over the runs whose base lies on the GPU in 16 bits."""
    rows, values = [], []
    for run in runs:
        if run.gpus > 1 or frozen_seconds(run.shape, run.recipe, run.gpu):
            continue
        windows, _, copied, updated = beside_bytes(run.shape, run.recipe, run.gpus)
        tokens = windows * run.recipe.data.window
        seconds = tokens / run.tokens_per_second
        moved = work_of(run.shape, run.recipe).moved / run.gpu.bytes_per_second
        others = seconds_per_token(run.shape, run.recipe, run.gpu) - PLAIN * moved
        others += (copied + updated) / run.gpu.bytes_per_second / tokens
        rows.append(moved * tokens / seconds)
        values.append(1 - others * tokens / seconds)
    return float(np.dot(rows, values) / np.dot(rows, rows))


def fit_fetched(runs: Sequence[Run]) -> float:
    """`frozen.FETCHED_PER_SECOND`: bytes a second, the mean over the runs whose base waits in host memory."""
    found = [fetched_bytes(run.shape, run.recipe) / _beyond(run) for run in runs if run.recipe.model.offload == "cpu"]
    return float(np.mean(found))


def _beyond(run: Run) -> float:
    """Seconds of a batch that the plan leaves to the frozen base."""
    step = step_of(run.shape, run.recipe, run.gpu, run.gpus)
    assert step is not None
    batches = run.recipe.accumulation(run.gpus)
    tokens = step.windows * run.recipe.data.window
    return (tokens / run.tokens_per_second - step.seconds + step.frozen) / batches
