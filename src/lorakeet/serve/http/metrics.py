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
        self._requests = self._counter("requests", "finished requests", "finish")
        self._refused = self._counter("refused", "requests that met a full queue")
        self._prompt = self._counter("prompt_tokens", "tokens of prompts")
        self._new = self._counter("new_tokens", "new tokens")
        self._cached = self._counter("cached_tokens", "tokens of prompts found in the prefix cache")
        self._queue = self._histogram("queue_seconds", "time in the queue", _FIRST)
        self._first = self._histogram("time_to_first_token_seconds", "time to the first token", _FIRST)
        self._between = self._histogram("time_between_tokens_seconds", "time between two tokens", _BETWEEN)
        engine.listen(self._note)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"lorakeet_{name}", help_text, ["adapter", *labels], registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lorakeet_{name}", help_text, ["adapter"], buckets=buckets, registry=self._registry)

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

    def note_encoded(self, model: str, tokens: int) -> None:
        """Count a request for vectors or classes, which the engine tells no events of.

        Args:
            model: Name that the caller asked for, which is served.
            tokens: Tokens of its texts.
        """
        self._requests.labels(model, "stop").inc()
        self._prompt.labels(model).inc(tokens)

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
