"""Prefixes that were computed before are not computed again, and never mixed up."""

from tests.scheduler.fake_worker import BASE, reply
from tests.scheduler.world import World

PROMPT = tuple(range(1, 14))  # three blocks of four, and one token


def test_an_equal_prompt_computes_only_what_is_after_its_full_blocks() -> None:
    world = World()
    first = world.submit(PROMPT)
    world.run()
    second = world.submit(PROMPT)
    world.run()
    assert world.finished[first].usage.cached_tokens == 0
    assert world.finished[second].usage.cached_tokens == 12
    assert world.tokens[second] == world.tokens[first]
    assert world.core.figures().prefix_cache_hit_tokens == 12


def test_a_prompt_is_found_while_the_first_with_it_still_runs() -> None:
    world = World()
    first = world.submit(PROMPT, max_tokens=9)
    world.step()
    second = world.submit(PROMPT, max_tokens=9)
    world.run()
    assert world.finished[second].usage.cached_tokens == 12
    assert world.tokens[second] == world.tokens[first]


def test_a_chunk_is_found_while_its_step_is_in_flight() -> None:
    world = World(prefill_chunk_tokens=7)
    first = world.submit(range(1, 31))
    second = world.submit(range(1, 31))
    world.step()  # two chunks were in flight, and the third leaves room
    [new] = world.worker.steps[1].new_rows
    assert new.cached_tokens == 12
    world.run()
    assert world.tokens[second] == world.tokens[first]


def test_two_equal_prompts_of_one_step_are_both_computed() -> None:
    world = World(started=False, step_tokens=32)
    requests = [world.submit(PROMPT) for _ in range(2)]
    world.worker_ready()
    assert len(world.worker.steps[0].new_rows) == 2
    world.run()
    assert [world.finished[request].usage.cached_tokens for request in requests] == [0, 0]


def test_a_prompt_of_whole_blocks_leaves_one_block_to_compute() -> None:
    world = World()
    world.submit(PROMPT[:12])
    world.run()
    second = world.submit(PROMPT[:12])
    world.run()
    assert world.finished[second].usage.cached_tokens == 8
    assert world.tokens[second] == reply(BASE, PROMPT[:12], 4, ignore_eos=True)


def test_the_next_turn_of_a_chat_finds_the_reply_of_the_one_before() -> None:
    world = World()
    first = world.submit(PROMPT, max_tokens=8)
    world.run()
    turn = (*PROMPT, *world.tokens[first], 3)
    second = world.submit(turn)
    world.run()
    assert world.finished[second].usage.cached_tokens == 20
    assert world.tokens[second] == reply(BASE, turn, 4, ignore_eos=True)


def test_adapters_and_the_base_share_nothing() -> None:
    world = World()
    for adapter in (None, "sql", "poet"):
        request = world.submit(PROMPT, adapter=adapter)
        world.run()
        assert world.finished[request].usage.cached_tokens == 0


def test_the_same_adapter_with_other_bytes_shares_nothing() -> None:
    world = World(slots=1)
    world.submit(PROMPT, adapter="sql")
    world.run()
    world.submit(adapter="poet")  # takes its place
    world.run()
    again = world.submit(PROMPT, adapter="sql")
    world.stage(content="sql, second edition")
    world.run()
    assert world.finished[again].usage.cached_tokens == 0
    assert world.tokens[again] == reply("sql, second edition", PROMPT, 4, ignore_eos=True)


def test_the_same_bytes_loaded_again_find_their_prefixes() -> None:
    world = World(slots=1)
    world.submit(PROMPT, adapter="sql")
    world.run()
    world.submit(adapter="poet")
    world.run()
    again = world.submit(PROMPT, adapter="sql")
    world.run()
    assert world.finished[again].usage.cached_tokens == 12


def test_a_cache_that_is_switched_off_finds_nothing() -> None:
    world = World(prefix_cache=False)
    world.submit(PROMPT)
    world.run()
    second = world.submit(PROMPT)
    world.run()
    assert world.finished[second].usage.cached_tokens == 0


def test_cached_blocks_make_way_for_running_sequences() -> None:
    world = World(kv_blocks=6)
    world.submit(PROMPT)
    world.run()
    request = world.submit(range(50, 70), max_tokens=5)  # takes all six blocks
    world.run()
    assert world.tokens[request] == reply(BASE, range(50, 70), 5, ignore_eos=True)
    assert world.core.figures().preemptions == 0
