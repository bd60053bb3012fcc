"""Metrics: each process keeps its own registry; the frontend shows them all on /metrics.

A process ships `snapshot(REGISTRY)` in a Stats message; the frontend merges the latest of each
process with `exposition`, and adds the labels `process` and `index`. Names end in their unit.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()  # this process's; pass it to each metric

Families = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


def snapshot(registry: CollectorRegistry = REGISTRY) -> Families:
    """All metrics as they stand: (name, help, type, [(sample name, labels, value)])."""
    return [
        (
            family.name,
            family.documentation,
            family.type,
            [
                (sample.name, dict(sample.labels), sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ],
        )
        for family in registry.collect()
    ]


class _Merged(Collector):
    def __init__(self, of_process: dict[tuple[str, int], Families]) -> None:
        self._of_process = of_process

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for (process, index), families in self._of_process.items():
            for name, text, kind, samples in families:
                metric = merged.setdefault(name, Metric(name, text, kind))
                for sample, labels, value in samples:
                    metric.add_sample(
                        sample, {**labels, "process": process, "index": str(index)}, value
                    )
        return merged.values()


def exposition(of_process: dict[tuple[str, int], Families]) -> bytes:
    """The Prometheus text format of the latest snapshot of each (process, index)."""
    registry = CollectorRegistry()
    registry.register(_Merged(of_process))
    return generate_latest(registry)
