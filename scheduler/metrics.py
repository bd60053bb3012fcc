"""The scheduler's figures as metrics, read from the core when they are asked for."""

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pipeline.messages import Tier
from scheduler.figures import Figures
from scheduler.timings import Timings

MAX_NAMED = 256  # adapters in one label

GAUGES = {
    "requests_running": "Sequences that have a row",
    "replies_kept": "Replies that have ended and whose end no frontend is known to have heard of",
    "requests_waiting": "Requests that wait for an adapter, a row or KV blocks",
    "kv_blocks_used": "KV blocks that running sequences hold",
    "kv_blocks_total": "KV blocks there are",
    "kv_block_tokens": "Tokens that a KV block holds",
    "adapters_resident": "Adapters in the device's pool",
    "adapters_pinned": "Adapters in the device's pool that administrators have pinned",
    "adapter_pool_used_bytes": "Bytes of the device's pool that adapters take",
    "adapter_pool_pinned_bytes": "Bytes of the device's pool that pinned adapters take",
}
COUNTERS = {
    "adapter_pool_evictions": "Adapters that left the device's pool for others",
    "prefix_cache_hit_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Sequences that gave up their KV blocks to run again later",
    "steps": "Steps sent to the GPU worker",
    "tokens_generated": "Tokens sent to tokenizer workers",
}

HISTOGRAMS = {  # name -> (attribute of Timings, text)
    "queue_seconds": ("queue", "From a request's arrival to its first step"),
    "request_first_token_seconds": ("first_token", "From a request's arrival to its first token"),
    "between_tokens_seconds": ("between_tokens", "From a token of a request to its next"),
    "inference_seconds": ("inference", "From a request's first step to its end"),
    "step_rows": ("step_rows", "Sequences in a step"),
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


class TimingsCollector(Collector):
    """Costs nothing between two collections."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings

    def collect(self) -> Iterable[Metric]:
        for name, (attribute, text) in HISTOGRAMS.items():
            counted = getattr(self._timings, attribute)
            buckets = [(bound, float(count)) for bound, count in counted.buckets()]
            yield HistogramMetricFamily(f"loradex_{name}", text, buckets, counted.total)


class AdaptersCollector(Collector):
    """Where adapters were when they were asked for, and, as vLLM tells it, which ones are here.

    tier_hits  requests by where their adapter lay
    names      of those that are resident, and of those that are waited for
    slots      how many can be resident
    """

    def __init__(
        self,
        *,
        tier_hits: Callable[[], Mapping[Tier, int]],
        names: Callable[[], tuple[list[str], list[str]]],
        slots: int,
    ) -> None:
        self._tier_hits = tier_hits
        self._names = names
        self._slots = slots

    def collect(self) -> Iterable[Metric]:
        hits = CounterMetricFamily(
            "loradex_adapter_tier_hits",
            "Requests, by where their adapter lay when they came",
            labels=["tier"],
        )
        tier_hits = self._tier_hits()
        for tier in Tier:
            hits.add_metric([tier.value], tier_hits.get(tier, 0))
        yield hits
        requests = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "The time; running are the adapters that are resident, waiting those waited for",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        resident, waiting = map(_joined, self._names())
        requests.add_metric([resident, waiting, str(self._slots)], time.time())
        yield requests


def _joined(names: list[str]) -> str:
    """What separates names cannot be in one."""
    return ",".join([name for name in names if "," not in name][:MAX_NAMED])
