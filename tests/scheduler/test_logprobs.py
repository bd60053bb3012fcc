"""Whose log-probabilities a step gave; those of a prompt come once, whatever becomes of it."""

import pytest

from pipeline.messages import Logprobs
from tests.scheduler.fake_worker import BASE, logprob_row, reply
from tests.scheduler.world import World

PROMPT = tuple(range(1, 14))  # three blocks of four, and one token
OF_PROMPT = [logprob_row(token) for token in PROMPT[1:]]
WANTED = Logprobs(1, prompt_top=1)


def of_reply(world: World, request: int) -> list[bytes]:
    return [logprob_row(token) for token in world.tokens[request]]


def test_they_come_with_the_tokens_of_those_that_want_them() -> None:
    world = World()
    without = world.submit([1, 2], max_tokens=5)
    wanting = world.submit([3], max_tokens=6, logprobs=Logprobs(1))
    also = world.submit([4], max_tokens=3, logprobs=Logprobs())
    world.run()
    for request in (wanting, also):
        assert world.logprobs[request] == of_reply(world, request)
    assert world.logprobs[without] == []
    assert not any(world.prompt_logprobs.values())


def test_a_neighbour_that_has_ended_takes_nobodys() -> None:
    world = World()
    ended = world.submit([3], max_tokens=9, logprobs=Logprobs(1))
    request = world.submit([4], max_tokens=5, logprobs=Logprobs(1))
    world.step()
    world.cancel(ended)  # with a token in flight
    world.run()
    assert world.logprobs[request] == of_reply(world, request)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5])
def test_a_prompt_is_scored_in_any_chunks(chunk_tokens: int) -> None:
    world = World(prefill_chunk_tokens=chunk_tokens)
    request = world.submit(PROMPT, logprobs=WANTED)
    world.run()
    assert world.prompt_logprobs[request] == OF_PROMPT
    assert world.logprobs[request] == of_reply(world, request)


def test_a_prompt_that_is_scored_is_computed_though_it_is_cached_and_cached_for_others() -> None:
    world = World()
    world.submit(PROMPT)
    world.run()
    scored = world.submit(PROMPT, logprobs=WANTED)
    world.run()
    after = world.submit(PROMPT)
    world.run()
    assert world.finished[scored].usage.cached_tokens == 0
    assert world.prompt_logprobs[scored] == OF_PROMPT
    assert world.finished[after].usage.cached_tokens == 12


def test_produced_tokens_alone_leave_the_cache_in_use() -> None:
    world = World()
    world.submit(PROMPT)
    world.run()
    request = world.submit(PROMPT, logprobs=Logprobs(3))
    world.run()
    assert world.finished[request].usage.cached_tokens == 12


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_prompt_is_told_once(prefix_cache: bool) -> None:
    """The older one grows into the blocks of the latest, whose prompt is half done. Without a
    prefix cache that starts anew, in chunks that it has told already."""
    world = World(kv_blocks=10, step_tokens=3, prefix_cache=prefix_cache)
    older = world.submit([7], max_tokens=30)
    for _ in range(13):
        world.step()
    latest = world.submit(range(20, 40), max_tokens=4, logprobs=WANTED)
    while not world.core.figures().preemptions:
        world.step()
    assert 0 < len(world.prompt_logprobs[latest]) < 19
    world.run()
    assert world.prompt_logprobs[latest] == [logprob_row(token) for token in range(21, 40)]
    assert world.tokens[older] == reply(BASE, [7], 30, ignore_eos=True)
    assert world.tokens[latest] == reply(BASE, range(20, 40), 4, ignore_eos=True)


def test_one_that_is_preempted_while_it_decodes_is_not_scored_again() -> None:
    world = World(kv_blocks=8)
    older = world.submit([7], max_tokens=30)
    latest = world.submit(range(20, 30), max_tokens=14, logprobs=WANTED)
    world.run()
    assert world.core.figures().preemptions > 0
    assert world.prompt_logprobs[latest] == [logprob_row(token) for token in range(21, 30)]
    assert world.logprobs[latest] == of_reply(world, latest)
    assert len(world.tokens[older]) == 30


def test_a_prompt_of_one_token_has_none() -> None:
    world = World()
    request = world.submit([5], logprobs=WANTED)
    world.run()
    assert world.prompt_logprobs[request] == []
    assert world.logprobs[request] == of_reply(world, request)
