"""What the scheduler tells of requests that are traced."""

from pipeline.messages import LoadAdapter, Prefetch
from tests.scheduler.world import World, key

TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


def test_a_traced_request_waits_in_a_queue_and_decodes() -> None:
    world = World()
    world.wait(1)
    world.submit(adapter="sql", max_tokens=3, trace=TRACE)
    world.wait(2)
    world.stage()
    while world.worker.steps:
        world.wait(0.25)
        world.step()
    queue, decode = world.spans
    assert (queue.name, queue.trace, decode.name) == ("queue", TRACE, "decode")
    assert queue.started == 1.0
    assert queue.ended == 3.0
    assert decode.ended - decode.started == 0.5
    assert decode.attributes["loradex.produced_tokens"] == 3


def test_the_loader_and_the_worker_hear_of_its_trace() -> None:
    world = World()
    world.submit(adapter="sql", trace=TRACE)
    assert world.to_loader() == [LoadAdapter(key("sql"), trace=TRACE)]
    world.stage()
    step = world.step()
    assert [new.trace for new in step.new_rows] == [TRACE]


def test_a_load_that_a_prefetch_asks_for_is_the_prefetching_requests() -> None:
    world = World()
    world.core.prefetch(Prefetch(key("sql"), trace=TRACE), world.now)
    world.settle()
    assert world.to_loader() == [LoadAdapter(key("sql"), trace=TRACE)]


def test_one_that_is_cancelled_while_it_decodes_has_its_span_and_others_have_none() -> None:
    world = World()
    request = world.submit(max_tokens=20, trace=TRACE)
    world.submit(max_tokens=20)
    waits = world.submit(adapter="missing", trace=TRACE)
    while not world.tokens[request]:
        world.step()
    world.cancel(request)
    world.cancel(waits)
    world.run()
    assert [span.name for span in world.spans] == ["queue", "decode"]
