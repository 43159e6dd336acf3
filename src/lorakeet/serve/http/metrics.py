"""Figures for Prometheus, by adapter: requests, tokens, queue, times to and between tokens, residents, prefix hits."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.registry import Collector

from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.stats import Event

__all__ = ["CONTENT_TYPE", "Metrics"]

#: Seconds. Upper bounds of the buckets of the times to the first token, and between tokens.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
#: Gauge -> help text and the figure of the engine that it shows.
_GAUGES = {
    "lorakeet_waiting": ("requests that wait", "waiting"),
    "lorakeet_running": ("requests that run", "rows"),
    "lorakeet_pages": ("pages for keys and values", "pages"),
    "lorakeet_pages_free": ("pages that nothing refers to", "pages_free"),
    "lorakeet_pages_cached": ("pages of the prefix cache", "pages_cached"),
}


class Metrics:
    """Figures of a server; it listens to its engine's events."""

    def __init__(self, engine: Engine, base_name: str) -> None:
        self._engine, self._base_name = engine, base_name
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(engine))
        by_adapter = {"labelnames": ["adapter"], "registry": self._registry}
        self._requests = Counter(
            "lorakeet_requests", "finished requests", ["adapter", "finish"], registry=self._registry
        )
        self._refused = Counter("lorakeet_refused", "requests that met a full queue", **by_adapter)
        self._prompt = Counter("lorakeet_prompt_tokens", "tokens of prompts", **by_adapter)
        self._new = Counter("lorakeet_new_tokens", "new tokens", **by_adapter)
        self._cached = Counter("lorakeet_cached_tokens", "tokens of prompts found in the prefix cache", **by_adapter)
        self._queue = Histogram(
            "lorakeet_queue_seconds", "time in the queue", buckets=_FIRST, **by_adapter
        )
        self._first = Histogram(
            "lorakeet_time_to_first_token_seconds", "time to the first token", buckets=_FIRST, **by_adapter
        )
        self._between = Histogram(
            "lorakeet_time_between_tokens_seconds", "time between two tokens", buckets=_BETWEEN, **by_adapter
        )
        engine.listen(self._note)

    def _note(self, event: Event) -> None:
        """Count an event; runs in the engine's thread."""
        name = self._base_name if event.adapter is None else event.adapter
        if event.kind == "token":
            self._between.labels(name).observe(event.seconds)
            self._new.labels(name).inc()
        elif event.kind == "first_token":
            self._first.labels(name).observe(event.seconds)
            self._new.labels(name).inc()
        elif event.kind == "admitted":
            self._queue.labels(name).observe(event.seconds)
        elif event.kind == "refused":
            self._refused.labels(name).inc()
        elif event.kind == "finished":
            self._requests.labels(name, str(event.finish)).inc()
            self._prompt.labels(name).inc(event.prompt_tokens)
            self._cached.labels(name).inc(event.cached_tokens)

    def text(self) -> bytes:
        """Return all figures in the text form of Prometheus."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """Figures of this moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, (help_text, figure) in _GAUGES.items():
            yield GaugeMetricFamily(name, help_text, getattr(stats, figure))
        loaded = GaugeMetricFamily("lorakeet_adapter_bytes", "bytes of a loaded adapter", labels=["adapter", "version"])
        for one in self._engine.residents.list():
            loaded.add_metric([one.name, str(one.version)], one.bytes)
        yield loaded
        yield GaugeMetricFamily("lorakeet_adapters", "loaded adapters", len(self._engine.residents.list()))
