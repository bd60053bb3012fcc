"""The cost of steps: learned from a machine of any speed, and what prompts may add to a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.step_cost import StepCost, Work
from tests.scheduler.fake_worker import unpack
from tests.scheduler.world import World

DECODE = Work(rows=64, kv_tokens=64 * 500, adapter_bytes=8 * 84_000_000, prompt_tokens=0)
MIXED = DECODE._replace(prompt_tokens=1000)
factors = st.floats(0.1, 500)


def machine(work: Work, *, decode: float, prompt: float) -> float:
    """Seconds of a step on a machine that is so many times slower than the one of the constants."""
    return decode * work.decode_seconds() + prompt * work.prompt_seconds()


def learned(*, decode: float, prompt: float, steps: int = 40) -> StepCost:
    cost = StepCost()
    for _ in range(steps):
        for work in (DECODE, MIXED):
            cost.learn(work, machine(work, decode=decode, prompt=prompt))
    return cost


@given(decode=factors, prompt=factors)
def test_the_cost_of_other_steps_follows_from_those_that_were_measured(
    decode: float, prompt: float
) -> None:
    cost = learned(decode=decode, prompt=prompt)
    another = Work(rows=8, kv_tokens=900, adapter_bytes=84_000_000, prompt_tokens=300)
    expected = machine(another, decode=decode, prompt=prompt)
    shadowed = 0.9 * decode * MIXED.decode_seconds() > prompt * MIXED.prompt_seconds()
    if not shadowed:  # else what prompts cost is lost in what decoding costs
        assert cost.seconds(another) == pytest.approx(expected, rel=0.05)


@given(decode=st.floats(0.1, 20), prompt=st.floats(2, 100), seconds=st.floats(0.01, 1))
def test_prompts_fill_a_step_up_to_its_time_or_take_as_long_as_decoding(
    decode: float, prompt: float, seconds: float
) -> None:
    cost = learned(decode=decode, prompt=prompt)
    tokens = cost.prompt_tokens_within(seconds, DECODE)
    assert tokens is not None
    taken = machine(DECODE._replace(prompt_tokens=tokens), decode=decode, prompt=prompt)
    least = machine(DECODE._replace(prompt_tokens=16), decode=decode, prompt=prompt)
    longest = max(seconds, 2 * machine(DECODE, decode=decode, prompt=prompt))
    assert taken <= max(longest * 1.3, least)


def test_nothing_is_bounded_before_a_prompt_has_been_measured() -> None:
    cost = StepCost()
    cost.learn(DECODE, 0.01)
    assert cost.prompt_tokens_within(0.1, DECODE) is None


def test_a_step_that_was_held_up_once_changes_little_and_one_without_time_nothing() -> None:
    cost = learned(decode=1.0, prompt=1.0)
    before = cost.seconds(MIXED)
    cost.learn(DECODE, 30.0)
    cost.learn(MIXED, 0.0)
    assert cost.seconds(MIXED) < 1.4 * before


def prompt_tokens(world: World) -> list[int]:
    return [sum(unpack(step.prefill)[2::3]) for step in world.worker.run_steps]


@pytest.mark.parametrize(("limit", "chunk"), [(0.0, 255), (0.5, 50)])
def test_a_long_prompt_does_not_hold_up_those_that_decode_for_longer_than_the_settings_say(
    limit: float, chunk: int
) -> None:
    """Each token of a prompt takes 10 ms, and a step that only decodes 1 ms."""
    world = World(kv_blocks=2048, step_tokens=256, max_step_seconds=limit)

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = sum(unpack(world.worker.steps[0].prefill)[2::3])
            world.wait(0.001 + 0.01 * tokens)
            world.step()

    world.submit([1] * 250, max_tokens=200)
    steps(20)
    before = len(world.worker.run_steps)
    world.submit([2] * 2000, max_tokens=2)
    steps(20)
    seen = [tokens for tokens in prompt_tokens(world)[before:] if tokens]
    assert sum(seen) / len(seen) == pytest.approx(chunk, rel=0.2)
    assert max(seen) <= 1.2 * chunk


def test_a_long_prompt_has_the_step_for_itself_while_nobody_decodes() -> None:
    world = World(kv_blocks=2048, step_tokens=256, max_step_seconds=0.01)
    world.submit([1] * 2000, max_tokens=2)
    while world.worker.steps:
        world.wait(1.0)
        world.step()
    assert max(prompt_tokens(world)) == 256
