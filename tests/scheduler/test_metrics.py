"""The scheduler's figures on /metrics."""

import time

from prometheus_client import CollectorRegistry

from pipeline.metrics import snapshot
from scheduler.metrics import AdaptersCollector, FiguresCollector
from tests.scheduler.world import World


def test_the_adapters_collector_tells_hits_by_tier_and_names_as_vllm_does() -> None:
    world = World()
    before = time.time()
    for adapter in ("sql", "a,b", "sql"):
        world.submit(adapter=adapter)
        world.run()
    world.submit(adapter="missing")
    registry = CollectorRegistry()
    core = world.core
    registry.register(
        AdaptersCollector(tier_hits=core.tier_hits, names=core.adapter_names, slots=8)
    )
    samples = [one for *_, of_family in snapshot(registry) for one in of_family]
    hits = {labels["tier"]: value for name, labels, value in samples if "tier" in labels}
    assert hits == {"device": 1, "host": 0, "disk": 3}
    ((_, labels, value),) = [one for one in samples if one[0] == "vllm:lora_requests_info"]
    assert labels == {
        "running_lora_adapters": "sql",
        "waiting_lora_adapters": "missing",
        "max_lora": "8",
    }
    assert before <= value <= time.time()


def test_the_figures_are_what_they_are_when_they_are_read() -> None:
    world = World(kv_blocks=32)
    registry = CollectorRegistry()
    registry.register(FiguresCollector(world.core.figures))
    world.submit(adapter="sql", max_tokens=5)
    world.stage(nbytes=512)
    running = {sample: value for *_, samples in snapshot(registry) for sample, _, value in samples}
    world.run()
    over = {sample: value for *_, samples in snapshot(registry) for sample, _, value in samples}
    assert running["loradex_requests_running"] == 1
    assert running["loradex_kv_blocks_used"] == 1
    assert running["loradex_kv_blocks_total"] == 32
    assert running["loradex_adapter_pool_used_bytes"] == 512
    assert over["loradex_requests_running"] == 0
    assert over["loradex_adapters_resident"] == 1
    assert over["loradex_tokens_generated_total"] == 5
    assert over["loradex_steps_total"] == 5
