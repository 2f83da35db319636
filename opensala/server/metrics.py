"""What a server counts, for Prometheus."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .loop import LoopStats

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1200)


class Metrics:
    """Counters of one server, in a registry of their own: two servers in a process do not add up.

    Args:
        stats: says what the engine holds.
    """

    def __init__(self, stats: Callable[[], LoopStats]) -> None:
        self.registry = CollectorRegistry()
        where: Any = {"registry": self.registry, "namespace": "opensala"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **where)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished requests.", **where)
        self.cached_tokens = Counter("cached_prompt_tokens", "Of them, not read again.", **where)
        self.restored_tokens = Counter(
            "restored_prompt_tokens", "Of the cached ones, read by a server before the last start.", **where
        )
        self.restored_prompts = Counter(
            "restored_prompts", "Prompts that such tokens were found for.", **where
        )
        self.new_tokens = Counter("generated_tokens", "Tokens generated.", **where)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS, **where
        )
        self.between_tokens = Histogram(
            "inter_token_seconds", "Between tokens of a request.", buckets=_SECONDS, **where
        )
        self.registry.register(_Gauges(stats))
        ProcessCollector(
            registry=self.registry
        )  # process_resident_memory_bytes, process_open_fds, ...; Linux

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, stats: Callable[[], LoopStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        for name, text, value in (
            ("requests_waiting", "Prompts that wait for a place in the engine.", stats.waiting),
            ("requests_running", "Sequences that hold memory.", stats.running),
            ("pages", "Pages of keys and values.", stats.pages),
            ("pages_free", "Of them, held by nobody.", stats.pages_free),
            ("state_slots", "Places for states.", stats.slots),
            ("state_slots_free", "Of them, held by nobody.", stats.slots_free),
            ("snapshots", "States kept for prompts that begin alike.", stats.snapshots),
            ("kept_prefixes", "Texts kept on disk for the next start.", stats.kept_texts),
            ("kept_prefix_bytes", "What they take there.", stats.kept_bytes),
        ):
            yield GaugeMetricFamily(f"opensala_{name}", text, value)
        for name, value in (stats.tiers or {}).items():  # since the start, but for bytes that are there now
            text = f"Keys and values by tier of memory: {name.replace('_', ' ')}."
            kind = GaugeMetricFamily if name in ("host_bytes", "device_bytes") else CounterMetricFamily
            yield kind(f"opensala_tier_{name}", text, value)
