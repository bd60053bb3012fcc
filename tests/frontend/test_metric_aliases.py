"""Our metrics under other names: the same figures, summed and labelled as others have them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from frontend.metric_aliases import with_aliases
from pipeline.metrics import exposition, snapshot

Page = dict[str, list[tuple[dict[str, str], float]]]


def page_of(registry: CollectorRegistry, process: str = "scheduler") -> Page:
    """Sample name -> its samples, without the labels that all have; read as Prometheus does."""
    shown = exposition({(process, 0): with_aliases(snapshot(registry), "some/base")}).decode()
    page: Page = {}
    for family in text_string_to_metric_families(shown):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("process") == process
            assert labels.pop("index") == "0"
            page.setdefault(sample.name, []).append((labels, sample.value))
    return page


def gauges(**values: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    for name, value in values.items():
        Gauge(f"loradex_{name}", "Text", registry=registry).set(value)
    return registry


def test_a_gauge_has_its_value_under_the_names_of_both() -> None:
    page = page_of(gauges(requests_waiting=3, requests_running=5))
    assert page["lorax_queue_length"] == [({}, 3)]
    assert page["vllm:num_requests_waiting"] == [({"model_name": "some/base"}, 3)]
    assert page["vllm:num_requests_running"] == [({"model_name": "some/base"}, 5)]


def test_kv_usage_is_a_share_and_the_cache_is_described() -> None:
    page = page_of(gauges(kv_blocks_used=30, kv_blocks_total=120, kv_block_tokens=16))
    model = {"model_name": "some/base"}
    assert page["vllm:kv_cache_usage_perc"] == [(model, 0.25)]
    assert page["vllm:cache_config_info"] == [
        ({"block_size": "16", "num_gpu_blocks": "120", **model}, 1)
    ]
    assert page["lorax_batch_current_max_tokens"] == [({}, 480)]
    starting = page_of(gauges(kv_blocks_used=0, kv_blocks_total=0, kv_block_tokens=1))
    assert starting["vllm:kv_cache_usage_perc"] == [(model, 0)]


def test_counters_are_summed_over_the_labels_that_others_do_not_have() -> None:
    registry = CollectorRegistry()
    ends = Counter("loradex_request_ends", "Text", ["reason"], registry=registry)
    for reason, times in (("eos", 2), ("stop", 3), ("length", 4), ("error", 5)):
        ends.labels(reason).inc(times)
    page = page_of(registry, "frontend")
    assert page["lorax_request_count"] == [({}, 14)]
    assert page["lorax_request_success"] == [({}, 9)]
    by_reason = {labels["finished_reason"]: n for labels, n in page["vllm:request_success_total"]}
    assert by_reason == {"stop": 5, "length": 4, "error": 5}


def test_failures_have_loraxs_words() -> None:
    registry = CollectorRegistry()
    failures = Counter("loradex_request_failures", "Text", ["kind"], registry=registry)
    for kind in ("adapter_not_found", "adapter_invalid", "validation", "timeout"):
        failures.labels(kind).inc()
    counted = {labels["err"]: n for labels, n in page_of(registry)["lorax_request_failure"]}
    assert counted == {"generation": 2, "validation": 1, "dropped": 1}


def test_a_histogram_keeps_its_buckets() -> None:
    registry = CollectorRegistry()
    seconds = Histogram(
        "loradex_request_seconds", "Text", ["route"], buckets=(1, 5), registry=registry
    )
    for route, value in (("/a", 0.5), ("/b", 3), ("/b", 9)):
        seconds.labels(route).observe(value)
    page = page_of(registry)
    for name in ("lorax_request_duration", "vllm:e2e_request_latency_seconds"):
        buckets = {labels["le"]: value for labels, value in page[f"{name}_bucket"]}
        assert buckets == {"1.0": 1, "5.0": 2, "+Inf": 3}
        assert [value for _, value in page[f"{name}_sum"]] == [12.5]
        assert [value for _, value in page[f"{name}_count"]] == [3]


def test_what_a_process_does_not_count_has_no_alias() -> None:
    assert set(page_of(gauges(arena_adapters=1))) == {"loradex_arena_adapters"}
