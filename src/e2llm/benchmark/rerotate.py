"""`e2llm benchmark rerotate`: how far cached keys, turned to another scale, are from reading the text again.

Flows in: a checkpoint, texts, prompt lengths, pairs of scales. Flows out: a Record. Each text's beginning is cached at
the old scale; what follows is then read at the new one, three ways: over the beginning read again at the new scale
(exact), over its keys turned, and over its keys as they are. Nats a token of the true continuation, and the divergence
of each distribution from the exact one, KL(exact ‖ other), say what is lost; seconds say what is gained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2llm.hf import get_extension, load_model
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.rerotate import Rerotation
from e2llm.records import Record, make_row, portable

PAGE_TOKENS = 16
CHUNK_TOKENS = 512
WAYS = ("read_again", "turned", "left")
"""What happens to the cached keys."""


@dataclass(frozen=True, kw_only=True)
class RerotateConfig:
    """Sizes of the measurement."""

    model: str
    texts: tuple[str, ...]
    """Files; one window of each."""
    prompt_tokens: tuple[int, ...] = (2048,)
    """Cached tokens, whole pages of 16."""
    new_tokens: int = 256
    """Tokens that follow and are scored."""
    scales: tuple[tuple[float, float], ...] = ((1.0, 2.0), (2.0, 4.0))
    """(old, new)."""
    dtype: str | None = None
    device: str | None = None
    base_model: str = ""

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("texts is empty: name at least one file")
        for tokens in (*self.prompt_tokens, self.new_tokens):
            if tokens < PAGE_TOKENS or tokens % PAGE_TOKENS:
                raise ValueError(f"tokens = {tokens}: use whole pages of {PAGE_TOKENS}, at least one")
        if any(scale < 1 for pair in self.scales for scale in pair):
            raise ValueError(f"scales = {self.scales}: give numbers of at least 1")


def benchmark_rerotate(
    config: RerotateConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Record], Any] = lambda record: None,
) -> Record:
    """Measure every text, length and pair. Raises ValueError for a text that is too short, or keys that cannot be
    turned."""
    model, tokenizer, _ = load_model(config.model, dtype=config.dtype, device=config.device)  # type: ignore[arg-type]
    longest = max(config.prompt_tokens) + config.new_tokens
    ids = {name: _tokens(tokenizer, name, longest) for name in config.texts}
    extension = get_extension(model)
    assert extension is not None, "load_model extends"
    packed = PackedModel(model, extension)
    try:
        measure = _Measure(packed, config, longest)
        examples: list[dict[str, Any]] = []
        for name, tokens in ids.items():
            for prompt in config.prompt_tokens:
                examples += [{"text": Path(name).name, **found} for found in measure.run(tokens, prompt)]
                progress(f"{Path(name).name}: {prompt} tokens")
                save(_record(config, packed, examples))
        return _record(config, packed, examples)
    finally:
        packed.restore()


def _tokens(tokenizer: Any, name: str, count: int) -> np.ndarray:
    try:
        text = Path(name).read_text(encoding="utf-8")[: 12 * count]
    except OSError as error:
        raise ValueError(f"texts: {name!r} cannot be read ({error.strerror or error})") from error
    ids = np.array(tokenizer(text).input_ids[:count], dtype=np.int64)
    if len(ids) < count:
        raise ValueError(f"texts: {name!r} has {len(ids)} tokens, {count} are needed")
    return ids


class _Measure:
    """Pages for a beginning at two scales, turned ones, and what follows."""

    def __init__(self, packed: PackedModel, config: RerotateConfig, longest: int) -> None:
        self.packed, self.config = packed, config
        self.per_text = longest // PAGE_TOKENS
        self.store = KeyValuePages(packed.shapes, 4 * self.per_text, PAGE_TOKENS, packed.device)
        self.rerotation = Rerotation(packed, self.store)

    @torch.no_grad()
    def run(self, ids: np.ndarray, prompt_tokens: int) -> list[dict[str, Any]]:
        """All pairs of scales: nats and KL a token for each way, and seconds."""
        prompt_pages = prompt_tokens // PAGE_TOKENS
        follows = ids[prompt_tokens : prompt_tokens + self.config.new_tokens]
        found: list[dict[str, Any]] = []
        for old, new in self.config.scales:
            table, fresh, turned, after = (1 + place * self.per_text + np.arange(self.per_text) for place in range(4))
            self._read(ids[:prompt_tokens], table, old)
            reread = self._seconds(lambda fresh=fresh, new=new: self._read(ids[:prompt_tokens], fresh, new))  # type: ignore[misc]
            turn = self._seconds(
                lambda table=table, turned=turned, old=old, new=new: self.rerotation.turn(  # type: ignore[misc]
                    table[:prompt_pages], turned[:prompt_pages], 0, old, new
                )
            )
            tables = {"read_again": fresh, "turned": turned, "left": table}
            logs = {
                way: self._continue(follows, np.concatenate((tables[way][:prompt_pages], after)), prompt_tokens, new)
                for way in WAYS
            }
            exact, target = logs["read_again"], torch.from_numpy(follows[1:]).to(self.packed.device)
            labels = {"window": prompt_tokens, "from_scale": old, "to_scale": new}
            for way, log in logs.items():
                nats = -log.gather(1, target[:, None]).mean()
                divergence = (exact.exp() * (exact - log)).sum(-1).mean()
                found.append(labels | {"keys": way, "nats_per_token": float(nats), "kl_nats": float(divergence)})
            found[-3]["seconds"], found[-2]["seconds"] = reread, turn
        return found

    def _seconds(self, run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        if self.packed.device.type == "cuda":
            torch.cuda.synchronize(self.packed.device)
        return time.perf_counter() - start

    def _read(self, ids: np.ndarray, table: np.ndarray, scale: float) -> None:
        for start in range(0, len(ids), CHUNK_TOKENS):
            self._forward(ids[start : start + CHUNK_TOKENS], table, start, scale, [])

    def _continue(self, ids: np.ndarray, table: np.ndarray, start: int, scale: float) -> torch.Tensor:
        """(tokens - 1, V) log probabilities, float32, after each token but the last."""
        logits = self._forward(ids, table, start, scale, list(range(len(ids) - 1)))
        return torch.log_softmax(logits.float(), dim=-1)

    def _forward(self, ids: np.ndarray, table: np.ndarray, start: int, scale: float, places: list[int]) -> torch.Tensor:
        step = PackedStep(self.store, [Piece(table, start, len(ids))])
        return self.packed.logits(step, ids, (scale,), np.zeros(len(ids), dtype=np.int64), places)


UNITS = {"nats_per_token": "nats", "kl_nats": "nats", "seconds": "s"}


def _record(config: RerotateConfig, packed: PackedModel, examples: list[dict[str, Any]]) -> Record:
    """Rows: means over texts, medians of seconds. Examples: every text's figures."""
    base = config.base_model or str(config.model).rstrip("/").rsplit("/", 1)[-1]
    labels = ("window", "from_scale", "to_scale", "keys")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for example in examples:
        groups.setdefault(tuple(example[label] for label in labels), []).append(example)
    rows = []
    for key, group in groups.items():
        for metric, unit in UNITS.items():
            values = [example[metric] for example in group if metric in example]
            if values:
                value = statistics.median(values) if metric == "seconds" else statistics.fmean(values)
                names = dict(zip(labels, key, strict=True))
                rows.append(make_row(metric, value, unit, len(values), base_model=base, **names))
    facts = {
        "device": packed.device.type,
        "dtype": str(packed.model.dtype).removeprefix("torch."),
        "method": packed.extension.method,
    }
    settings = asdict(config) | facts | {"texts": [Path(name).name for name in config.texts]}
    return Record(kind="rerotate", config=portable(settings), rows=rows, examples=list(examples))
