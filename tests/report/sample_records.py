"""Invented Records with the shape of real ones: a quickstart, a study of several checkpoints, a training run."""

from __future__ import annotations

import math
from typing import Any

from e2llm.records import Record, make_row

ENVIRONMENT = {"time": "2026-01-01T00:00:00+00:00", "python": "3.12.0", "cpu": "Example CPU", "torch": "2.11.0"}
NATIVE = 8192
WINDOWS = [4096 * 2**power for power in range(6)]

# checkpoint, method -> perplexity at 4k … 128k; None: not measured
STUDY: dict[tuple[str, str], list[float | None]] = {
    ("base", "none"): [6.98, 5.97, 17.8, 244.0, None, None],
    ("base", "linear"): [6.98, 5.97, 29.1, 91.8, 158.0, 206.0],
    ("base", "ntk"): [6.98, 5.97, 5.85, 5.99, 11.6, 27.0],
    ("base", "yarn"): [6.98, 5.97, 5.76, 5.56, 6.64, 11.9],
    ("plain", "yarn"): [5.01, 4.37, 4.26, 4.09, 4.70, 8.59],
    ("paper", "linear"): [5.59, 4.82, 4.50, 4.10, 4.02, 5.98],
    ("recommended", "yarn"): [5.18, 4.51, 4.26, 3.84, 3.77, 4.38],
}


def study(corpus: str = "mathematics") -> Record:
    """Perplexity of every checkpoint, a (window × scale) grid and pass keys by depth for `recommended`."""
    labels: dict[str, Any] = {"base_model": "SmolLM2-135M-Instruct", "native_window": NATIVE}
    rows = []
    for (checkpoint, method), values in STUDY.items():
        for window, value in zip(WINDOWS, values, strict=True):
            if value is None:
                continue
            scale = 1.0 if method == "none" else max(1.0, window / NATIVE)
            own = {**labels, "checkpoint": checkpoint, "method": method, "window": window}
            factor = 1.0 if corpus == "mathematics" else 4.6
            rows.append(
                make_row(
                    "perplexity", value * factor, "ratio", 262_144, **own, corpus=corpus, protocol="whole", scale=scale
                )
            )
            if checkpoint == "recommended":
                rows += [
                    make_row("perplexity", value * factor * (1 + 0.02 * abs(math.log2(other / scale))
                             + (0.4 * math.log2(scale / other) if other < scale else 0)), "ratio", 262_144,
                             **own, corpus=corpus, protocol="whole", scale=other)
                    for other in (1.0, 2.0, 4.0, 8.0, 16.0) if other != scale
                ]  # fmt: skip
            if corpus == "mathematics" and checkpoint in ("base", "recommended") and method != "linear":
                rows += _keys(own, scale, checkpoint)
    return Record("evaluate", {"evaluate": {"corpus": corpus, "windows": WINDOWS}}, rows, [], dict(ENVIRONMENT))


def _keys(labels: dict[str, Any], scale: float, checkpoint: str) -> list[dict[str, Any]]:
    reach = 3.2 if checkpoint == "recommended" else 0.7
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    shares = [max(0.0, min(1.0, 1.1 - math.log2(labels["window"] / 4096) / (reach + 2 * abs(d - 0.4)))) for d in depths]
    rows = [
        make_row("retrieval", round(share * 20) / 20, "share", 20, **labels, task="pass_key", scale=scale, depth=depth)
        for depth, share in zip(depths, shares, strict=True)
    ]
    mean = sum(row["value"] for row in rows) / len(rows)
    return [*rows, make_row("retrieval", mean, "share", 100, **labels, task="pass_key", scale=scale)]


def training() -> Record:
    """A loss every 10 steps, held-out losses at three scales every 100."""
    rows = []
    for step in range(10, 851, 10):
        wobble = 0.04 * math.sin(step * 1.7) + 0.03 * math.cos(step * 0.61)
        value = 1.6 + 0.9 * math.exp(-step / 120) + wobble
        rows.append(make_row("loss", value, "nats", 327_680, step=step, checkpoint="recommended"))
    for scale in (1.0, 4.0, 16.0):
        for step in range(0, 851, 100):
            value = 1.55 + 0.05 * math.log2(scale) + (0.5 + 0.2 * math.log2(scale)) * math.exp(-step / 150)
            rows.append(
                make_row(
                    "loss", value, "nats", 65_536, step=step, checkpoint="recommended", split="held_out", scale=scale
                )
            )
    rows.append(make_row("tokens_per_second", 113_000.0, "tokens/s", 850, checkpoint="recommended"))
    config = {
        "model": {"name": "SmolLM2-135M-Instruct"},
        "train": {"steps": 850, "learning_rate": 2e-4, "betas": [0.9, 0.95]},
    }
    return Record("train", config, rows, [], {**ENVIRONMENT, "gpu": "Example GPU", "gpus": 1})


def quickstart() -> Record:
    """Base and extended at 512, 2048 and 8192, as `results.json` of the quickstart."""
    rows = []
    for checkpoint, method, values, found in (
        ("base", "none", (82.4, 127.0, 176.0), (0.98, 0.02, 0.0)),
        ("extended", "yarn", (82.8, 80.9, 80.1), (0.98, 0.94, 0.6)),
    ):
        for window, value, share in zip((512, 2048, 8192), values, found, strict=True):
            scale = 1.0 if checkpoint == "base" else window / 512
            labels = {
                "checkpoint": checkpoint,
                "method": method,
                "window": window,
                "scale": scale,
                "base_model": "tiny-512",
            }
            rows.append(make_row("perplexity", value, "ratio", 98_304, **labels, corpus="python", protocol="whole"))
            rows.append(make_row("retrieval", share, "share", 50, **labels, task="key_values"))
    return Record("quickstart", {"model": {"name": "tiny-512", "native_window": 512}}, rows, [], dict(ENVIRONMENT))


def needles() -> Record:
    """Needle maps of two checkpoints, eleven depths, with intervals; RULER scores of three kinds."""
    rows = []
    labels: dict[str, Any] = {"base_model": "SmolLM2-135M-Instruct", "native_window": NATIVE, "corpus": "novels"}
    for checkpoint, method, reach in (("base", "none", 1.5), ("recommended", "yarn", 5.0)):
        for power, window in enumerate(WINDOWS):
            own = labels | {"checkpoint": checkpoint, "method": method, "window": window}
            own["scale"] = 1.0 if method == "none" else max(1.0, window / NATIVE)
            for depth in range(11):
                share = max(0.0, min(1.0, 1.2 - power / reach - 0.02 * depth))
                place = {"task": "needle", "depth": depth / 10, "low": share / 2, "high": (1 + share) / 2}
                rows.append(make_row("retrieval", share, "share", 10, **own, **place))
            for kind, hard in (("niah_single_1", 0.0), ("niah_multikey_3", 0.3), ("vt", 0.7)):
                share = max(0.0, 1.0 - power / reach / 4 - hard)
                place = {"task": kind, "protocol": "ruler", "low": share / 2, "high": (1 + share) / 2}
                rows.append(make_row("string_match", share, "share", 100, **own, **place))
    return Record("evaluate", {}, rows, [], dict(ENVIRONMENT))


def context() -> Record:
    """Loss by position of one checkpoint in four windows, to the ends that make the widest table."""
    rows = []
    labels = {"base_model": "SmolLM2-135M-Instruct", "checkpoint": "recommended", "method": "yarn", "corpus": "novels"}
    for window in WINDOWS[::2]:
        for power in range(2, int(math.log2(window)) + 1):
            value = 4.5 - power / 7
            place = {"position": 2**power - 1, "protocol": "position", "window": window}
            ends = {"scale": max(1, window / NATIVE), "low": value - 0.2, "high": value + 0.2}
            rows.append(make_row("loss", value, "nats", 2**power * 10, **labels, **place, **ends))
    return Record("evaluate", {}, rows, [], dict(ENVIRONMENT))
