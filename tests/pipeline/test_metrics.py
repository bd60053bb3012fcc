"""Metrics of all processes on one page."""

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from pipeline.messages import Stats
from pipeline.metrics import exposition, snapshot


def registry(tokens: int = 3) -> CollectorRegistry:
    own = CollectorRegistry()
    Counter("loradex_tokens", "Tokens", ["adapter"], registry=own).labels("sql").inc(tokens)
    Gauge("loradex_free_blocks", "Blocks", registry=own).set(7)
    Histogram("loradex_step_seconds", "Step", buckets=(0.1, 1.0), registry=own).observe(0.5)
    return own


def samples(page: bytes) -> dict[tuple[str, str, str], float]:
    """(sample name, process, index) -> value; of histograms the count alone."""
    return {
        (sample.name, sample.labels["process"], sample.labels["index"]): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_sum"))
    }


def test_what_a_process_ships_is_what_the_page_shows_with_its_name() -> None:
    page = exposition({("scheduler", 0): snapshot(registry())})
    assert samples(page) == {
        ("loradex_tokens_total", "scheduler", "0"): 3,
        ("loradex_free_blocks", "scheduler", "0"): 7,
        ("loradex_step_seconds_count", "scheduler", "0"): 1,
    }
    assert b'loradex_tokens_total{adapter="sql",index="0",process="scheduler"} 3.0' in page
    assert b'loradex_step_seconds_bucket{index="0",le="1.0",process="scheduler"} 1.0' in page


def test_the_same_metric_of_several_processes_is_one_family() -> None:
    page = exposition(
        {
            ("tokenizer_workers", 0): snapshot(registry(tokens=1)),
            ("tokenizer_workers", 1): snapshot(registry(tokens=2)),
        }
    )
    values = samples(page)
    assert values[("loradex_tokens_total", "tokenizer_workers", "0")] == 1
    assert values[("loradex_tokens_total", "tokenizer_workers", "1")] == 2
    assert page.count(b"# TYPE loradex_tokens_total counter") == 1
    assert page.count(b"# HELP loradex_free_blocks Blocks") == 1


def test_a_snapshot_survives_the_way_to_the_frontend() -> None:
    stats = Stats("scheduler", 0, snapshot(registry()))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=Stats)
    assert arrived == stats
    page = exposition({("scheduler", 0): arrived.families})
    assert page == exposition({("scheduler", 0): stats.families})


def test_without_any_process_the_page_is_empty() -> None:
    assert exposition({}) == b""
