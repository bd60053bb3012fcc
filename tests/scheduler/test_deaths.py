"""A worker or a loader dies and is replaced: what ran goes on as if nothing had been."""

from array import array
from typing import Any

import pytest

from pipeline.messages import (
    AdapterKey,
    AdminVerb,
    FinishReason,
    ForgetAdapter,
    LoadAdapter,
    Logprobs,
    NamesKept,
    ReleaseAdapter,
    Tier,
)
from tests.scheduler.fake_worker import BASE, logprob_row, reply
from tests.scheduler.world import World, key

PROMPT = (1, 2, 3, 4, 5, 6)


def expected(world: World, request_id: int, content: str = BASE) -> list[int]:
    request = world.requests[request_id]
    return reply(content, array("i", request.token_ids), request.max_tokens, ignore_eos=True)


def replace_worker(world: World, **sizes: int) -> None:
    world.lose_worker(**sizes)
    world.worker_ready()


def replace_loader(world: World) -> None:
    world.lose_loader()
    world.arena_ready()


@pytest.mark.parametrize("steps", range(8))
def test_a_reply_goes_on_after_its_last_token_that_was_told(steps: int) -> None:
    world = World()
    request_id = world.submit(PROMPT, max_tokens=6)
    for _ in range(steps):
        if world.worker.steps:
            world.step()
    told = list(world.tokens[request_id])
    replace_worker(world)
    assert world.tokens[request_id] == told
    world.run()
    assert world.tokens[request_id] == expected(world, request_id)


def test_those_that_ran_go_before_those_that_waited() -> None:
    world = World(rows=2)
    ran = [world.submit((number, 1), max_tokens=8) for number in (1, 2)]
    waits = world.submit((3, 1), max_tokens=1)
    world.step()
    replace_worker(world)
    assert [new.token_ids[:4] for new in world.worker.steps[0].new_rows] == [
        array("i", [number]).tobytes() for number in (1, 2)
    ]
    world.run()
    for request_id in (*ran, waits):
        assert world.tokens[request_id] == expected(world, request_id)


def test_nothing_is_sent_to_a_worker_that_is_not_ready() -> None:
    world = World()
    world.submit(PROMPT, adapter="a")
    world.stage()
    world.lose_worker()
    world.submit(PROMPT, adapter="b")
    world.stage()
    assert not world.worker.steps
    assert not world.worker.placing
    world.worker_ready()
    world.run()
    assert len(world.finished) == 2


def test_the_prefix_cache_of_a_dead_worker_is_not_used() -> None:
    world = World()
    first = world.submit(PROMPT)
    world.run()
    replace_worker(world)
    second = world.submit(PROMPT)
    world.run()
    assert world.finished[second].usage.cached_tokens == 0
    assert world.tokens[second] == world.tokens[first]


def test_an_adapter_that_was_resident_is_asked_for_again_if_somebody_needs_it() -> None:
    world = World()
    needed = world.submit(PROMPT, adapter="needed", max_tokens=8)
    world.submit(PROMPT, adapter="idle", max_tokens=1)
    world.stage()
    world.stage()
    for _ in range(4):
        world.step()
    replace_worker(world)
    assert [load.adapter.id for load in world.loader.loads] == ["needed"]
    world.run()
    assert world.tokens[needed] == expected(world, needed, "needed")
    assert world.loader.leases == {}


def test_an_adapter_whose_copy_was_under_way_is_placed_again_without_a_load() -> None:
    world = World()
    request_id = world.submit(PROMPT, adapter="a")
    world.stage()
    assert world.worker.placing
    replace_worker(world)
    assert not world.loader.loads
    assert [one.copy.arena_offset for one in world.worker.placing] == list(world.loader.leases)
    world.run()
    assert world.tokens[request_id] == expected(world, request_id, "a")
    assert world.loader.leases == {}


def test_a_pinned_adapter_is_pinned_again() -> None:
    world = World()
    world.command(AdminVerb.PIN, adapter="a")
    world.run()
    assert world.core.figures().adapters_pinned == 1
    replace_worker(world)
    assert world.core.figures().adapters_pinned == 0
    world.run()
    assert world.core.figures().adapters_pinned == 1
    assert world.list_adapters()["a"].tier == Tier.DEVICE


def test_grammars_are_compiled_again_before_their_sequences_start() -> None:
    world = World()
    request_id = world.submit(PROMPT, grammar="g", max_tokens=5)
    world.compile()
    world.step()
    world.step()
    replace_worker(world)
    assert not world.worker.steps
    [compile_again] = world.compiling
    assert compile_again.source == "g"
    world.compile()
    new = world.worker.steps[0].new_rows[0]
    assert new.prompt_tokens == len(PROMPT)
    assert len(new.token_ids) // 4 > len(PROMPT)  # what was produced is read by its matcher
    world.run()
    assert world.tokens[request_id] == expected(world, request_id)


def test_a_grammar_that_nobody_has_is_not_compiled_again() -> None:
    world = World()
    world.submit(grammar="g")
    world.run()
    replace_worker(world)
    assert not world.compiling
    world.submit(grammar="g")
    assert len(world.compiling) == 1
    world.run()


def test_log_probabilities_of_a_prompt_are_told_once() -> None:
    world = World(prefill_chunk_tokens=2)
    request_id = world.submit(PROMPT, logprobs=Logprobs(prompt_top=0), max_tokens=3)
    for _ in range(2):
        world.step()
    assert world.prompt_logprobs[request_id]
    replace_worker(world)
    world.run()
    assert world.prompt_logprobs[request_id] == [logprob_row(token) for token in PROMPT[1:]]
    produced = expected(world, request_id)
    assert world.logprobs[request_id] == [logprob_row(token) for token in produced]


def test_choices_that_wait_for_the_first_ones_prompt_go_on_waiting() -> None:
    world = World(prefill_chunk_tokens=2)
    first = world.submit(PROMPT, choices=3, max_tokens=2)
    world.step()
    replace_worker(world)
    world.run()
    assert all(world.tokens[first + choice] == expected(world, first) for choice in range(3))


def test_what_does_not_fit_a_smaller_worker_fails() -> None:
    world = World(kv_blocks=32)
    large = world.submit(PROMPT, max_tokens=60)
    small = world.submit(PROMPT, max_tokens=4)
    world.step()
    replace_worker(world, kv_blocks=8)
    assert world.finished[large].reason is FinishReason.ERROR
    world.run()
    assert world.tokens[small] == expected(world, small)


def test_figures_that_add_up_do_not_start_over() -> None:
    world = World(kv_blocks=6, rows=4)
    for number in range(4):
        world.submit((number + 1,) * 4, max_tokens=8)
    world.run()
    before = world.core.figures()
    assert before.preemptions
    replace_worker(world)
    after = world.core.figures()
    assert (after.preemptions, after.steps) == (before.preemptions, before.steps)


@pytest.mark.parametrize("steps", range(1, 24))
def test_those_that_were_preempted_go_on_whenever_it_happens(steps: int) -> None:
    world = World(kv_blocks=6, rows=4)
    requests = [world.submit((number + 1,) * 4, max_tokens=8) for number in range(4)]
    for _ in range(steps):
        if world.worker.steps:
            world.step()
    replace_worker(world)
    world.run()
    for request_id in requests:
        assert world.tokens[request_id] == expected(world, request_id)
    assert world.core.figures().kv_blocks_used == 0


# --- the loader -----------------------------------------------------------------------------------


def test_what_was_not_answered_is_asked_again_with_its_token() -> None:
    world = World()
    request_id = world.submit(PROMPT, adapter="a", token="secret")
    replace_loader(world)
    assert world.loader.loads == [LoadAdapter(key("a"), "secret")]
    world.run()
    assert world.tokens[request_id] == expected(world, request_id, "a")


def test_a_loader_that_is_not_ready_is_asked_nothing() -> None:
    world = World()
    world.lose_loader()
    world.submit(PROMPT, adapter="a")
    world.command(AdminVerb.LOAD, name="x", adapter="b", in_place=True)
    assert not world.loader.loads
    assert not world.loader.forgets
    world.arena_ready()
    assert [load.adapter.id for load in world.loader.loads] == ["a"]
    assert world.loader.forgets == [key("b")]


def test_extents_that_are_read_stay_leased() -> None:
    world = World()
    world.submit(PROMPT, adapter="a")
    world.stage()
    [(offset, adapter)] = world.loader.leases.items()
    replace_loader(world)
    assert world.loader.leases == {offset: adapter}
    world.arrive()  # which fails the test if the extent was overwritten
    assert world.to_loader()[-1] == ReleaseAdapter(key("a"), offset)
    world.run()


def test_a_copy_that_ends_while_there_is_no_loader_leaves_no_lease() -> None:
    world = World()
    world.submit(PROMPT, adapter="a")
    world.stage()
    world.lose_loader()
    world.arrive()
    world.arena_ready()
    assert world.loader.leases == {}
    world.run()


def test_an_unload_that_waits_for_the_loader_does_not_wait_for_ever() -> None:
    world = World()
    world.command(AdminVerb.LOAD, name="x", adapter="a")
    world.run()
    world.take_names()
    unload = world.command(AdminVerb.UNLOAD, name="x")
    world.take_names()
    assert world.loader.forgets
    replace_loader(world)
    assert world.loader.forgets == [key("a")]
    assert ForgetAdapter(key("a")) in world.to_loader()
    world.run()
    assert world.done[unload] is None


def test_a_new_arena_holds_nothing_that_could_be_found() -> None:
    world = World()
    world.submit(adapter="a")
    world.run()
    replace_worker(world)
    assert world.list_adapters()["a"].tier == Tier.HOST
    replace_loader(world)
    assert world.list_adapters()["a"].tier == Tier.DISK


# --- the scheduler itself, and frontends ----------------------------------------------------------


def names(version: int, **named: str) -> dict[str, Any]:
    return {"version": version, "names": {name: key(of) for name, of in named.items()}}


def test_names_that_frontends_have_kept_hold_on() -> None:
    world = World()
    world.core.names_kept(NamesKept(**names(7, x="a"), frontend=0))
    world.core.names_kept(NamesKept(**names(6, y="b"), frontend=0))  # of one that fell behind
    unload = world.command(AdminVerb.UNLOAD, name="x")
    assert (world.names[0].version, world.names[0].names) == (8, {})
    world.take_names()
    world.run()
    assert world.done[unload] is None


def test_a_frontend_that_starts_again_is_told_the_names_and_waited_for() -> None:
    world = World()
    load = world.command(AdminVerb.LOAD, name="x", adapter="a")
    world.run()
    told = world.names[0]
    assert told.names == {"x": AdapterKey("local", "a")}
    world.names[0] = type(told)(0, {})  # it knows nothing
    world.core.frontend_started(0, world.now)
    world.settle()
    assert world.names[0] == told
    assert load not in world.done
    world.take_names()
    assert world.done[load] is None
