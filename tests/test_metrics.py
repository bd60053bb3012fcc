"""docs/metrics.md lists the metrics of the code: names, types and labels, process by process."""

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

import adapter_loader.loading
import adapter_loader.metrics
import adapter_loader.packing_processes
import adapter_loader.remote.disk_cache
import frontend.metrics
import pipeline.process
import tokenizer_workers.__main__
from adapter_loader.core import Core
from frontend.metric_aliases import LORAX, UNTYPED, VLLM, Alias, Computed, Facts
from gpu_worker.figures import Figures
from pipeline.config import Settings
from scheduler.core import Scheduler
from scheduler.metrics import AdaptersCollector, FiguresCollector, TimingsCollector
from tests.metrics_page import OF_HISTOGRAMS, AliasRow, Row, alias_rows, rows


def collectors() -> dict[str, list[Collector]]:
    """All that each process registers."""
    scheduler = Scheduler(settings=Settings(), eos_token_ids=())
    adapters = AdaptersCollector(
        tier_hits=scheduler.tier_hits, names=scheduler.adapter_names, slots=1
    )
    arena = adapter_loader.metrics.ArenaCollector(Core(arena_bytes=4096, load_seconds=1))
    loading = (
        adapter_loader.loading,
        adapter_loader.metrics,
        adapter_loader.packing_processes,
        adapter_loader.remote.disk_cache,
    )
    return {
        "Every process": found_in(pipeline.process),
        "frontend": found_in(frontend.metrics),
        "tokenizer_workers": found_in(tokenizer_workers.__main__),
        "scheduler": [
            FiguresCollector(scheduler.figures),
            TimingsCollector(scheduler.timings),
            adapters,
        ],
        "adapter_loader": [arena, *(one for module in loading for one in found_in(module))],
        "gpu_worker": found_in(Figures(CollectorRegistry())),
    }


def found_in(holder: object) -> list[Collector]:
    """The metrics among the attributes."""
    return [one for one in vars(holder).values() if isinstance(one, MetricWrapperBase)]


def described(collector: Collector) -> dict[str, Row]:
    """name as it is shown -> what a row of the page should say."""
    if isinstance(collector, MetricWrapperBase):
        labels = frozenset(collector._labelnames)
        return {_shown(one): Row(one.type, labels) for one in collector.describe()}
    return {
        _shown(one): Row(
            one.type,
            frozenset(name for sample in one.samples for name in sample.labels) - OF_HISTOGRAMS,
        )
        for one in collector.collect()
    }


def _shown(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_the_page_lists_every_metric_of_every_process() -> None:
    for process, of_process in collectors().items():
        metrics = {name: row for one in of_process for name, row in described(one).items()}
        assert rows()[process] == metrics, process


def described_alias(alias: Alias | Computed | Facts, labels: frozenset[str]) -> AliasRow:
    """What its row of the page should say; labels are those of all of its family."""
    kind = "untyped" if alias.kind == UNTYPED else alias.kind
    match alias:
        case Alias():
            return AliasRow(kind, labels.union(alias.labels), (alias.ours,))
        case Computed():
            return AliasRow(kind, labels, alias.ours)
        case Facts():
            return AliasRow(kind, labels.union(alias.ours), tuple(alias.ours.values()))


def test_the_page_lists_every_name_of_other_servers() -> None:
    described = {
        alias.name + "_total" * (alias.kind == "counter"): described_alias(alias, labels)
        for aliases, labels in ((LORAX, frozenset()), (VLLM, frozenset({"model_name"})))
        for alias in aliases
    }
    assert alias_rows() == described


def test_every_alias_is_made_of_a_metric_that_there_is_and_is_of_its_type() -> None:
    every = {name: row.kind for of in rows().values() for name, row in of.items()}
    kinds = {
        name.removesuffix("_total") if kind == "counter" else name: kind
        for name, kind in every.items()
    }
    for name, row in alias_rows().items():
        expected = {"untyped": "counter"}.get(row.kind, row.kind)
        assert {kinds[ours] for ours in row.ours} == {expected}, name
