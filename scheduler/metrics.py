"""The scheduler's figures as metrics, read from the core when they are asked for."""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.figures import Figures

GAUGES = {
    "requests_running": "Sequences that have a row",
    "requests_waiting": "Requests that wait for an adapter, a row or KV blocks",
    "kv_blocks_used": "KV blocks that running sequences hold",
    "kv_blocks_total": "KV blocks there are",
    "adapters_resident": "Adapters in the device's pool",
    "adapter_pool_used_bytes": "Bytes of the device's pool that adapters take",
}
COUNTERS = {
    "prefix_cache_hit_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Sequences that gave up their KV blocks to run again later",
    "steps": "Steps sent to the GPU worker",
    "tokens_generated": "Tokens sent to tokenizer workers",
}


class FiguresCollector(Collector):
    """Costs nothing between two collections."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        figures = self._figures()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"loradex_{name}", text, getattr(figures, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"loradex_{name}", text, getattr(figures, name))
