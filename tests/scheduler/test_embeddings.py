"""A request that is embedded prefills among the others; its end has an embedding and no token."""

import pytest

from pipeline.messages import FailureKind, FinishReason, Pooling, PoolingKind
from tests.scheduler.fake_worker import BASE, BROKEN, embedding, reply, unpack
from tests.scheduler.world import World

PROMPT = tuple(range(1, 14))  # three blocks of four, and one token
LAST, MEAN = Pooling(), Pooling(PoolingKind.MEAN)


def check(world: World, request: int, prompt: tuple[int, ...], pooling: Pooling) -> None:
    end = world.finished[request]
    assert (end.reason, end.failure) == (FinishReason.EMBEDDED, None)
    assert end.embedding == embedding(BASE, prompt, pooling)
    assert world.tokens[request] == []
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(prompt), 0)


@pytest.mark.parametrize("pooling", [LAST, MEAN])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 5])
def test_in_any_chunks_beside_rows_that_decode(pooling: Pooling, chunk_tokens: int) -> None:
    world = World(prefill_chunk_tokens=chunk_tokens)
    decoding = world.submit([7], max_tokens=30)
    world.step()
    request = world.submit(PROMPT, max_tokens=1, pooling=pooling)
    world.run()
    check(world, request, PROMPT, pooling)
    assert world.tokens[decoding] == reply(BASE, [7], 30, ignore_eos=True)
    mixed = [step for step in world.worker.run_steps if step.decode_rows and step.prefill]
    assert len(mixed) >= (1 if chunk_tokens == 0 else len(PROMPT) // chunk_tokens)


def test_with_an_adapter_it_is_the_adapters() -> None:
    world = World()
    request = world.submit(PROMPT, max_tokens=1, adapter="a", pooling=LAST)
    world.run()
    assert world.finished[request].embedding == embedding("a", PROMPT, LAST)


@pytest.mark.parametrize(("pooling", "cached"), [(LAST, 12), (MEAN, 0)])
def test_the_last_state_needs_the_last_token_alone_and_a_mean_all(
    pooling: Pooling, cached: int
) -> None:
    world = World()
    world.submit(PROMPT)
    world.run()
    request = world.submit(PROMPT, max_tokens=1, pooling=pooling)
    world.run()
    check(world, request, PROMPT, pooling)
    assert world.finished[request].usage.cached_tokens == cached


def test_what_it_computes_is_cached_for_others() -> None:
    world = World()
    world.submit(PROMPT, max_tokens=1, pooling=MEAN)
    world.run()
    after = world.submit(PROMPT)
    world.run()
    assert world.finished[after].usage.cached_tokens == 12


@pytest.mark.parametrize("pooling", [LAST, MEAN])
def test_one_that_is_preempted_is_embedded_all_the_same(pooling: Pooling) -> None:
    """The older one grows into the blocks of the latest, whose prompt is half done."""
    world = World(kv_blocks=10, step_tokens=3)
    older = world.submit([7], max_tokens=30)
    for _ in range(13):
        world.step()
    prompt = tuple(range(20, 40))
    latest = world.submit(prompt, max_tokens=1, pooling=pooling)
    world.run()
    assert world.core.figures().preemptions == 1
    check(world, latest, prompt, pooling)
    assert world.tokens[older] == reply(BASE, [7], 30, ignore_eos=True)


def test_its_row_is_free_again_once_it_has_ended() -> None:
    world = World(rows=1)
    requests = [world.submit(PROMPT, max_tokens=1, pooling=LAST) for _ in range(3)]
    world.run()
    for request in requests:
        check(world, request, PROMPT, LAST)
    assert [unpack(step.free_rows) for step in world.worker.run_steps] == [[], [0], [0]]


def test_it_is_never_decoded() -> None:
    world = World()
    world.submit(PROMPT, max_tokens=1, pooling=LAST)
    world.run()
    assert [step.decode_rows for step in world.worker.run_steps] == [b""]


def test_one_that_is_cancelled_takes_nobodys() -> None:
    world = World()
    gone = world.submit(PROMPT, max_tokens=1, pooling=LAST)
    left = world.submit((5, 6), max_tokens=1, pooling=MEAN)
    world.cancel(gone)
    world.run()
    check(world, left, (5, 6), MEAN)
    assert gone not in world.finished


def test_one_that_is_not_finite_fails_and_its_neighbours_do_not() -> None:
    world = World()
    broken = world.submit(PROMPT, max_tokens=1, adapter="a", pooling=MEAN)
    fine = world.submit(PROMPT, max_tokens=1, pooling=MEAN)
    world.stage(content=BROKEN)
    world.run()
    failure = world.finished[broken].failure
    assert failure is not None
    assert failure.kind is FailureKind.ADAPTER_INVALID
    assert world.finished[broken].embedding == b""
    check(world, fine, PROMPT, MEAN)
