"""Several replies to one prompt: the first computes it, the others find it in the cache."""

from pipeline.choices import request_ids, seed_of
from pipeline.messages import FailureKind, FinishReason, Logprobs, Step
from tests.scheduler.fake_worker import BASE, reply
from tests.scheduler.world import World

PROMPT = tuple(range(1, 14))  # three blocks of four, and one token


def steps_of(world: World) -> list[Step]:
    return world.worker.run_steps


def test_all_are_answered_and_the_prompt_is_computed_once() -> None:
    world = World()
    first = world.submit(PROMPT, choices=3)
    world.run()
    cached = [world.finished[one].usage.cached_tokens for one in request_ids(first, 3)]
    assert cached == [0, 12, 12]
    for request in request_ids(first, 3):
        assert world.tokens[request] == reply(BASE, PROMPT, 4, ignore_eos=True)


def test_the_others_start_while_the_first_ones_step_is_in_flight() -> None:
    world = World()
    world.submit(PROMPT, choices=3, max_tokens=9)
    assert [len(step.new_rows) for step in world.worker.steps] == [1, 2]


def test_a_prompt_in_chunks_is_waited_for_to_its_end() -> None:
    world = World(prefill_chunk_tokens=5)
    first = world.submit(PROMPT, choices=2)
    world.run()
    assert [len(step.new_rows) for step in steps_of(world)[:4]] == [1, 0, 0, 1]
    assert world.finished[first + 1].usage.cached_tokens == 12


def test_each_has_a_seed_of_its_own() -> None:
    world = World()
    world.submit(PROMPT, choices=3, seed=7)
    world.run()
    seeds = [new.sampling.seed for step in steps_of(world) for new in step.new_rows]
    assert sorted(seeds) == sorted(seed_of(7, choice) for choice in range(3))


def test_without_a_prefix_cache_nobody_waits() -> None:
    world = World(prefix_cache=False, started=False, step_tokens=64)
    first = world.submit(PROMPT, choices=3)
    world.worker_ready()
    assert len(world.worker.steps[0].new_rows) == 3
    world.run()
    assert len(world.finished) == 3
    assert world.tokens[first + 2] == reply(BASE, PROMPT, 4, ignore_eos=True)


def test_the_prompt_is_scored_once() -> None:
    world = World()
    first = world.submit(PROMPT, choices=2, logprobs=Logprobs(0, prompt_top=0))
    world.run()
    assert len(world.prompt_logprobs[first]) == 12
    assert world.prompt_logprobs[first + 1] == []
    assert len(world.logprobs[first + 1]) == 4
    assert world.finished[first + 1].usage.cached_tokens == 12


def test_one_may_be_cancelled_and_the_others_go_on() -> None:
    world = World(rows=1)
    running = world.submit([9], max_tokens=9)
    first = world.submit(PROMPT, choices=3)
    world.cancel(first)
    world.cancel(first + 2)
    world.run()
    assert set(world.finished) == {running, first + 1}
    assert world.tokens[first + 1] == reply(BASE, PROMPT, 4, ignore_eos=True)


def test_the_next_one_computes_the_prompt_when_the_first_has_left() -> None:
    world = World(prefill_chunk_tokens=5)
    first = world.submit(PROMPT, choices=3)
    world.cancel(first)  # with two chunks in flight
    world.run()
    assert [world.finished[one].usage.cached_tokens for one in (first + 1, first + 2)] == [8, 12]


def test_all_may_be_cancelled_before_they_start() -> None:
    world = World(rows=1)
    running = world.submit([9], max_tokens=9)
    first = world.submit(PROMPT, choices=3)
    for request in request_ids(first, 3):
        world.cancel(request)
    world.run()
    assert set(world.finished) == {running}


def test_what_one_cannot_have_none_can() -> None:
    world = World(kv_blocks=4)
    first = world.submit(range(1, 40), choices=3)
    assert [end.reason for end in world.finished.values()] == [FinishReason.ERROR] * 3
    assert list(world.finished) == [first, first + 1, first + 2]


def test_before_the_worker_is_ready_too() -> None:
    world = World(kv_blocks=4, started=False)
    world.submit(range(1, 40), choices=3)
    world.worker_ready()
    assert [end.reason for end in world.finished.values()] == [FinishReason.ERROR] * 3


def test_an_adapter_that_cannot_be_had_fails_all_and_is_asked_for_once() -> None:
    world = World()
    world.submit(PROMPT, adapter="sql", choices=3)
    world.fail_load()
    assert len(world.finished) == 3
    assert world.core.idle
    assert len(world.to_loader()) == 1


def test_they_wait_no_longer_than_others() -> None:
    world = World(rows=1, max_wait_seconds=5)
    world.submit([9], max_tokens=40)
    first = world.submit(PROMPT, choices=2)
    world.wait(5)
    failures = [world.finished[one].failure for one in request_ids(first, 2)]
    assert [failure and failure.kind for failure in failures] == [FailureKind.TIMEOUT] * 2


def test_to_the_limit_of_a_tenant_they_are_one_request() -> None:
    world = World(rows=1, max_tenant_waiting=2)
    world.submit([9], max_tokens=9, tenant="t")
    several = world.submit(PROMPT, choices=3, tenant="t")
    world.submit([8], tenant="t")
    refused = world.submit([7], choices=2, tenant="t")
    assert set(world.finished) == {refused, refused + 1}
    world.cancel(several)  # the next takes its place among those that wait
    again = world.submit([6], tenant="t")
    assert again in world.finished
    world.run()
    assert len(world.finished) == 7
