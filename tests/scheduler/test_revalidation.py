"""Adapters on the device: asked about again, refused to whom they are refused now, replaced."""

from typing import Any

import pytest

from pipeline.messages import (
    AdapterKey,
    Failure,
    FailureKind,
    FinishReason,
    LoadAdapter,
    ReleaseAdapter,
)
from tests.scheduler.fake_loader import NOT_FOUND, UNAVAILABLE
from tests.scheduler.fake_worker import reply
from tests.scheduler.world import World, key

SECONDS = 10.0
PROMPT = tuple(range(1, 14))  # three blocks of four, and one token
PRIVATE = AdapterKey("hub", "acme/secret", scope="a digest of a token")
FORBIDDEN = Failure(403, FailureKind.ADAPTER_FORBIDDEN, "the token may not read it")


def world_with(adapter: str | AdapterKey = "sql", **settings: Any) -> World:
    """The adapter is resident, and was asked about at 0."""
    world = World(adapter_revalidate_seconds=SECONDS, **settings)
    world.submit(adapter=adapter, max_tokens=1, token="token")
    world.run()
    return world


def questions(world: World) -> int:
    return sum(isinstance(message, LoadAdapter) for message in world.to_loader())


def whole(content: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 4) -> list[int]:
    return reply(content, prompt, max_tokens, ignore_eos=True)


def test_a_loaded_adapter_is_not_asked_about_for_half_of_the_time() -> None:
    world = world_with()
    world.wait(SECONDS / 2 - 0.1)
    world.prefetch("sql")
    world.submit(adapter="sql")
    assert questions(world) == 1


def test_in_the_second_half_it_is_asked_about_and_nobody_waits_for_the_answer() -> None:
    world = world_with()
    world.wait(SECONDS / 2)
    request = world.submit(adapter="sql")
    assert questions(world) == 2
    while world.worker.steps:
        world.step()
    assert request in world.finished
    world.stage()  # not changed
    assert not world.loader.leases
    world.wait(SECONDS / 2)
    world.submit(adapter="sql")
    assert len(world.worker.steps) == 2, "the answer was as good as one that was waited for"
    world.run()


def test_after_that_time_a_request_waits_for_the_answer_and_others_do_not() -> None:
    world = world_with()
    world.wait(SECONDS)
    waiting = [world.submit(adapter="sql") for _ in range(2)]
    other = world.submit()
    while world.worker.steps:
        world.step()
    assert list(world.finished)[1:] == [other]
    assert questions(world) == 2, "one answer is for both"
    world.stage()
    world.run()
    assert [world.tokens[one] for one in waiting] == [whole("sql", (1, 2, 3))] * 2
    assert len(world.worker.placements) == 1, "it has not been copied again"


def test_at_an_interval_of_zero_each_request_asks() -> None:
    world = World(adapter_revalidate_seconds=0)
    for count in range(1, 4):
        world.submit(adapter="sql")
        assert questions(world) == count
        world.run()


def test_the_question_is_asked_with_the_token_of_whoever_comes() -> None:
    world = world_with(PRIVATE)
    world.wait(SECONDS)
    world.submit(adapter=PRIVATE, token="token")
    assert world.to_loader()[-1] == LoadAdapter(PRIVATE, "token")


def test_a_token_that_was_revoked_ends_those_that_come_and_not_those_that_run() -> None:
    world = world_with(PRIVATE)
    running = world.submit(adapter=PRIVATE, max_tokens=20)
    world.wait(SECONDS)
    late = world.submit(adapter=PRIVATE, token="token")
    world.fail_load(failure=FORBIDDEN)
    assert world.finished[late].failure == FORBIDDEN
    world.run()
    assert world.tokens[running] == whole(PRIVATE.id, (1, 2, 3), 20)
    assert world.core.figures().adapters_resident == 0
    world.submit(adapter=PRIVATE, token="token")
    world.fail_load(failure=FORBIDDEN)
    assert len(world.worker.placements) == 1, "it never starts from what still lay there"


def test_a_refusal_counts_though_nobody_waits_for_it() -> None:
    world = world_with(PRIVATE)
    world.wait(SECONDS / 2)
    world.submit(adapter=PRIVATE, max_tokens=1)
    world.fail_load(failure=FORBIDDEN)
    while world.worker.steps:
        world.step()
    assert world.core.figures().adapters_resident == 0


def test_a_local_adapter_that_is_gone_is_not_served_any_more() -> None:
    world = world_with()
    world.wait(SECONDS)
    request = world.submit(adapter="sql")
    world.fail_load()
    assert world.finished[request].failure == NOT_FOUND


def test_what_everybody_may_read_is_served_while_its_source_is_down() -> None:
    world = world_with()
    world.wait(SECONDS)
    request = world.submit(adapter="sql")
    world.fail_load(failure=UNAVAILABLE)
    world.run()
    assert world.finished[request].reason is FinishReason.LENGTH
    world.submit(adapter="sql")
    assert questions(world) == 2, "nobody asks again at once"
    world.run()


def test_what_needs_a_token_is_not_served_longer_than_its_source_has_allowed() -> None:
    world = world_with(PRIVATE)
    world.wait(SECONDS / 2)
    early = world.submit(adapter=PRIVATE, token="token")
    world.fail_load(failure=UNAVAILABLE)
    world.wait(SECONDS / 2)
    late = world.submit(adapter=PRIVATE, token="token")
    world.fail_load(failure=UNAVAILABLE)
    assert world.finished[late].failure == UNAVAILABLE
    again = world.submit(adapter=PRIVATE, token="token")
    world.run()
    assert world.finished[early].reason is FinishReason.LENGTH
    assert world.finished[again].reason is FinishReason.LENGTH
    assert len(world.worker.placements) == 1


@pytest.mark.parametrize("adapter", [key("sql"), PRIVATE], ids=["public", "private"])
def test_a_question_without_an_answer_is_as_good_as_a_source_that_is_down(
    adapter: AdapterKey,
) -> None:
    world = world_with(adapter, adapter_load_seconds=3)
    world.wait(SECONDS)
    request = world.submit(adapter=adapter)
    world.wait(3)
    while world.worker.steps:
        world.step()
    served = world.finished[request].failure is None
    assert served == (not adapter.scope)
    world.run()
    assert not world.loader.leases


def test_another_content_answers_those_that_come_and_the_old_one_those_that_run() -> None:
    world = world_with()
    running = world.submit(PROMPT, adapter="sql", max_tokens=30)
    world.step()
    world.wait(SECONDS)
    late = world.submit(PROMPT, adapter="sql")
    world.stage(content="second")
    while late not in world.finished:
        world.step()
    assert running not in world.finished, "they run side by side"
    assert world.core.figures().adapters_resident == 2
    world.run()
    assert world.tokens[running] == whole("sql", max_tokens=30)
    assert world.tokens[late] == whole("second")
    assert world.finished[late].usage.cached_tokens == 0, "the KV is of another content"
    assert world.core.figures().adapters_resident == 1
    assert not world.loader.leases
    after = world.submit(PROMPT, adapter="sql")
    world.run()
    assert world.tokens[after] == whole("second")
    assert world.finished[after].usage.cached_tokens == 12


def test_content_that_nobody_runs_with_goes_as_soon_as_there_is_another() -> None:
    world = world_with(slots=1)
    world.wait(SECONDS)
    request = world.submit(adapter="sql")
    world.stage(content="second")
    world.run()
    assert world.tokens[request] == whole("second", (1, 2, 3))


def test_content_that_comes_back_finds_its_own_kv() -> None:
    world = World(adapter_revalidate_seconds=0)
    cached = []
    for content in ("first", "second", "first"):
        request = world.submit(PROMPT, adapter="sql")
        world.stage(content=content)
        world.run()
        assert world.tokens[request] == whole(content)
        cached.append(world.finished[request].usage.cached_tokens)
    assert cached == [0, 0, 12]


def test_a_request_that_was_preempted_goes_on_with_the_content_it_started_with() -> None:
    world = World(
        kv_blocks=8, block_tokens=4, prefix_cache=False, adapter_revalidate_seconds=SECONDS
    )
    world.submit([1] * 5, adapter="sql", max_tokens=24)
    preempted = world.submit([2] * 5, adapter="sql", max_tokens=24)
    world.stage()
    while world.core.figures().preemptions == 0:
        world.step()
    world.wait(SECONDS)
    late = world.submit(adapter="sql")
    world.stage(content="second")
    world.run()
    assert world.tokens[preempted] == whole("sql", (2,) * 5, 24)
    assert world.tokens[late] == whole("second", (1, 2, 3))
    assert world.core.figures().adapters_resident == 1


def test_a_lease_comes_back_for_each_answer() -> None:
    world = world_with()
    for _ in range(3):
        world.wait(SECONDS)
        world.submit(adapter="sql")
        world.run()
    answers = [message for message in world.to_loader() if isinstance(message, ReleaseAdapter)]
    assert len(answers) == questions(world) == 4


def test_an_adapter_that_is_evicted_while_it_is_asked_about_is_not_asked_for_twice() -> None:
    world = world_with(slots=1)
    world.wait(SECONDS / 2)
    world.prefetch("sql")
    world.submit(adapter="other")
    world.stage(1)
    world.run()
    assert questions(world) == 3
    assert not world.loader.leases
