"""Out of KV blocks, the latest makes way and goes on later as if nothing had happened."""

from tests.scheduler.fake_worker import BASE, EOS, reply, unpack
from tests.scheduler.world import World


def test_the_latest_is_preempted_and_both_replies_are_undisturbed() -> None:
    world = World(kv_blocks=8, block_tokens=4)
    first = world.submit([1, 2, 3, 4, 5], max_tokens=24)
    second = world.submit([9, 8, 7, 6, 5], max_tokens=24)
    world.run()
    assert world.core.figures().preemptions >= 1
    assert world.tokens[first] == reply(BASE, [1, 2, 3, 4, 5], 24, ignore_eos=True)
    assert world.tokens[second] == reply(BASE, [9, 8, 7, 6, 5], 24, ignore_eos=True)
    ends = list(world.finished)
    assert ends == [first, second]


def test_the_oldest_is_never_preempted() -> None:
    world = World(kv_blocks=10, block_tokens=4, rows=4)
    requests = [world.submit([n] * 5, max_tokens=30) for n in range(1, 5)]
    world.run()
    rows_of_first = [
        new for step in world.worker.run_steps for new in step.new_rows if new.token_ids[0] == 1
    ]
    assert len(rows_of_first) == 1
    assert next(iter(world.finished)) == requests[0]


def test_a_preempted_sequence_comes_back_with_its_tokens_and_the_length_of_its_prompt() -> None:
    world = World(kv_blocks=8, block_tokens=4, prefix_cache=False)
    world.submit([1] * 5, max_tokens=24)
    second = world.submit([2] * 5, max_tokens=24)
    world.run()
    starts = [
        new
        for step in world.worker.run_steps
        for new in step.new_rows
        if unpack(new.token_ids)[0] == 2
    ]
    assert len(starts) >= 2
    assert all(new.prompt_tokens == 5 for new in starts)
    produced = len(starts[1].token_ids) // 4 - 5
    assert unpack(starts[1].token_ids)[5:] == world.tokens[second][:produced]
    assert produced > 0


def test_a_preempted_sequence_finds_in_the_cache_what_is_left_of_it() -> None:
    world = World(kv_blocks=16, block_tokens=4)
    world.submit([1] * 21, max_tokens=24)
    world.submit([2] * 21, max_tokens=24)
    world.run()
    starts = [new for step in world.worker.run_steps for new in step.new_rows]
    assert world.core.figures().preemptions >= 1
    assert starts[-1].cached_tokens > 0
    assert all(end.usage.cached_tokens == 0 for end in world.finished.values())


def test_a_preempted_sequence_may_end_with_a_token_that_was_in_flight() -> None:
    for seed in range(1, 400):
        prompt = [seed, 5, 5, 5, 5]
        world = World(kv_blocks=8, block_tokens=4)
        world.submit([1] * 5, max_tokens=24)
        second = world.submit(prompt, max_tokens=24, ignore_eos=False)
        started = 0
        while second not in world.finished:
            world.step()
            started = sum(len(step.new_rows) for step in world.worker.run_steps)
        if world.core.figures().preemptions == 1 and started == 2:
            assert world.tokens[second][-1] == EOS
            world.run()
            assert world.core.figures().kv_blocks_used == 0
            return
    raise AssertionError("no prompt ends in that moment")


def test_a_preempted_sequence_can_be_cancelled() -> None:
    world = World(kv_blocks=8, block_tokens=4)
    first = world.submit([1] * 5, max_tokens=24)
    second = world.submit([2] * 5, max_tokens=24)
    while world.core.figures().preemptions == 0:
        world.step()
    world.cancel(second)
    world.run()
    assert list(world.finished) == [first]


def test_nobody_who_came_later_takes_the_blocks_of_a_preempted_sequence() -> None:
    world = World(kv_blocks=10, block_tokens=4, prefix_cache=False, rows=2)
    world.submit([1] * 5, max_tokens=30)
    world.submit([2] * 5, max_tokens=30)
    world.submit([3], max_tokens=2)
    world.run()
    starts = [unpack(new.token_ids)[0] for step in world.worker.run_steps for new in step.new_rows]
    assert world.core.figures().preemptions == 1
    assert starts == [1, 2, 2, 3]


def test_a_sequence_that_shares_nothing_of_equal_blocks_still_ends() -> None:
    """Two that computed the same prompt at once hold it twice, more than either needs alone."""
    world = World(kv_blocks=12, block_tokens=4, started=False, step_tokens=64, rows=2)
    requests = [world.submit(range(1, 18), max_tokens=28) for _ in range(2)]
    world.worker_ready()
    world.run()
    for request in requests:
        assert world.tokens[request] == reply(BASE, range(1, 18), 28, ignore_eos=True)


def test_a_sequence_is_not_started_if_it_would_leave_no_block_for_each_that_runs() -> None:
    world = World(kv_blocks=4, block_tokens=4, rows=2)
    first = world.submit([1], max_tokens=9)
    second = world.submit([2] * 12, max_tokens=2)
    world.step()
    assert world.core.figures().requests_running == 1
    world.run()
    assert list(world.finished) == [first, second]
    assert world.core.figures().preemptions == 0


def test_when_one_that_found_too_few_blocks_is_cancelled_the_next_is_tried() -> None:
    world = World(kv_blocks=8, block_tokens=4, rows=3)
    first = world.submit([1], max_tokens=20)
    large = world.submit([2] * 30, max_tokens=2)
    small = world.submit([3], max_tokens=2)
    world.step()
    world.cancel(large)
    world.run()
    assert list(world.finished) == [small, first]
