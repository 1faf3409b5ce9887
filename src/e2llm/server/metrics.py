"""What Prometheus reads at /metrics: the engine's own counts and what became of the requests.

Flows in: `EngineStats` at each scrape, events of requests. Flows out: the text format. Each app has its own registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from e2llm.engine.request import EngineStats
from e2llm.positions.choose import ladder
from e2llm.server.limits import Gate

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
BEYOND = "beyond"

_GAUGES = {
    "running": "Sequences that the engine is working on",
    "waiting": "Sequences that wait inside the engine",
    "kv_tokens_used": "Token slots held by sequences and the prefix cache",
    "kv_tokens_total": "Token slots there are",
}
_COUNTERS = {
    "prompt_tokens_total": "Tokens prefilled, those found in the prefix cache not counted",
    "cached_tokens_total": "Prompt tokens found in the prefix cache",
    "output_tokens_total": "Tokens written",
}


class _EngineCollector(Collector):
    """Asks the engine and the gate at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats], gate: Gate) -> None:
        self._stats, self._gate = stats, gate

    def describe(self) -> list[Metric]:
        return []  # the engine is not asked while the registry is put together

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"e2llm_engine_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"e2llm_engine_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily("e2llm_server_running", "Sequences handed to the engine", value=self._gate.running)
        yield GaugeMetricFamily("e2llm_server_queued", "Sequences that wait for a place", value=self._gate.waiting)


class Metrics:
    """Counters and histograms of one app."""

    def __init__(self, stats: Callable[[], EngineStats], gate: Gate, max_scale: float) -> None:
        self.registry = CollectorRegistry()
        self._steps = ladder(max_scale)
        self.registry.register(_EngineCollector(stats, gate))
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "e2llm_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.refusals = Counter(
            "e2llm_refusals", "Requests refused, by the code of the error", ["code"], registry=self.registry
        )
        self.answers = Counter(
            "e2llm_answers", "Answers by how they ended", ["endpoint", "scale", "end"], registry=self.registry
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request's arrival", _SECONDS)
        self.seconds = self._histogram("request_seconds", "From a request's arrival to its last token", _SECONDS)
        self.output_tokens = self._histogram("output_tokens", "New tokens of a sequence", _TOKENS)
        self.prompt_tokens = self._histogram("prompt_tokens", "Tokens of a prompt", (*_TOKENS, 65536, 262144))
        self.queue_seconds = Histogram(
            "e2llm_queue_seconds", "Wait for a place in the engine", buckets=_SECONDS, registry=self.registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"e2llm_{name}", text, ["scale"], buckets=buckets, registry=self.registry)

    def scale_label(self, scale: float) -> str:
        """The step of the ladder that holds a scale: clients may ask for any number, labels must stay few."""
        step = next((step for step in self._steps if step >= scale), None)
        return BEYOND if step is None else f"{step:g}"

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
