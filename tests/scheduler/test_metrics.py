"""The scheduler's figures on /metrics."""

from prometheus_client import CollectorRegistry

from pipeline.metrics import snapshot
from scheduler.metrics import FiguresCollector
from tests.scheduler.world import World


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
