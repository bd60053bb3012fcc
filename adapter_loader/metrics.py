"""What the loader counts: answered loads, and the arena as the core knows it."""

from collections.abc import Iterable

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapter_loader.core import Core
from pipeline.metrics import REGISTRY

LOADS = Counter(
    "loradex_adapter_loads",
    "Answered loads; the outcome is `staged` or the kind of the failure",
    ["source", "outcome"],
    registry=REGISTRY,
)


class ArenaCollector(Collector):
    """The host tier."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterable[Metric]:
        core = self._core
        yield GaugeMetricFamily(
            "loradex_arena_used_bytes", "Bytes of the arena that are taken", core.used_bytes
        )
        yield GaugeMetricFamily(
            "loradex_arena_adapters", "Packed adapters that lie in the arena", core.staged
        )
        yield CounterMetricFamily(
            "loradex_arena_evictions", "Adapters that left the arena for others", core.evictions
        )
