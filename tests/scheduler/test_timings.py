"""The times that requests take, as distributions."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.timings import Distribution
from tests.scheduler.world import World


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 5))))
def test_a_bucket_has_all_values_that_are_not_above_its_bound(
    values: list[tuple[float, int]],
) -> None:
    counted = Distribution((1, 2.5, 10))
    for value, times in values:
        counted.add(value, times)
    expected = {
        bound: sum(times for value, times in values if value <= float(bound))
        for bound in ("1.0", "2.5", "10.0", "+Inf")
    }
    assert dict(counted.buckets()) == expected
    assert counted.count == expected["+Inf"]
    assert counted.total == pytest.approx(sum(value * times for value, times in values))


@pytest.mark.parametrize("kv_blocks", [64, 8])
def test_each_token_but_the_first_is_timed_once_from_the_one_before(kv_blocks: int) -> None:
    """With few blocks, the latest are preempted and go on later."""
    world = World(kv_blocks=kv_blocks, block_tokens=4, prefix_cache=False)
    requests = [world.submit([n + 1] * 5, max_tokens=20) for n in range(3)]
    arrival = dict.fromkeys(requests, world.now)
    times: dict[int, list[float]] = {request: [] for request in requests}
    while len(world.finished) < len(requests):
        world.step()
        world.wait(0.5)
        for request in requests:
            new = len(world.tokens[request]) - len(times[request])
            assert new in (0, 1)
            times[request] += [world.now] * new
    gaps = [after - before for of_one in times.values() for before, after in pairwise(of_one)]
    timings = world.core.timings
    assert (world.core.figures().preemptions > 0) == (kv_blocks == 8)
    assert timings.between_tokens.count == len(gaps) == 3 * 19
    assert timings.between_tokens.total == pytest.approx(sum(gaps))
    waits = [times[request][0] - arrival[request] for request in requests]
    assert timings.first_token.count == timings.queue.count == timings.inference.count == 3
    assert timings.first_token.total == pytest.approx(sum(waits), abs=0.5 * 3)


def test_a_reply_whose_first_token_is_its_last_has_a_first_token() -> None:
    world = World()
    world.submit([1, 2], max_tokens=1)
    world.run()
    assert world.core.timings.first_token.count == 1
    assert world.core.timings.between_tokens.count == 0


def test_what_ends_before_it_starts_has_no_times() -> None:
    world = World()
    world.cancel(world.submit([1, 2], adapter="missing"))
    world.run()
    timings = world.core.timings
    assert timings.queue.count == timings.first_token.count == timings.inference.count == 0
