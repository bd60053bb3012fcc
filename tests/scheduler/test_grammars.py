"""A sequence with a grammar starts once the worker has compiled it; others do not wait."""

import random

from pipeline.messages import CompileGrammar, FailureKind, FinishReason
from scheduler.grammars import MAX_IDLE
from tests.scheduler.fake_worker import BASE, reply
from tests.scheduler.world import World


def compilations(world: World) -> list[CompileGrammar]:
    return [message for _, _, message in world.sent if isinstance(message, CompileGrammar)]


def test_a_request_waits_for_its_grammar_and_others_pass_it() -> None:
    world = World()
    constrained = world.submit([1, 2], grammar="a")
    free = world.submit([3, 4])
    step = world.step()
    assert [world.finished, len(step.new_rows)] == [{}, 1]
    while free not in world.finished:
        world.step()
    assert not world.tokens[constrained]

    world.compile()
    step = world.step()
    assert [row.grammar_id for row in step.new_rows] == [compilations(world)[0].grammar_id]
    world.run()
    assert world.tokens[constrained] == reply(BASE, [1, 2], 4, ignore_eos=True)


def test_a_row_without_a_grammar_names_none() -> None:
    world = World()
    world.submit()
    assert [row.grammar_id for row in world.step().new_rows] == [0]


def test_a_grammar_is_compiled_once_for_all_that_have_it() -> None:
    world = World()
    for text in ("a", "b", "a"):
        world.submit(grammar=text)
    world.run()
    world.submit(grammar="a")
    world.run()
    assert [one.source for one in compilations(world)] == ["a", "b"]
    assert len({one.grammar_id for one in compilations(world)}) == 2


def test_a_grammar_that_cannot_be_compiled_ends_those_that_wait_for_it() -> None:
    world = World()
    first, second, other = (world.submit(grammar=text) for text in ("bad", "bad", "good"))
    world.compile("what is wrong with it")
    for request in (first, second):
        end = world.finished[request]
        assert end.reason is FinishReason.ERROR
        assert end.failure is not None
        assert (end.failure.status, end.failure.kind) == (422, FailureKind.GRAMMAR)
        assert end.failure.message == "what is wrong with it"
    world.run()
    assert world.finished[other].reason is FinishReason.LENGTH
    again = world.submit(grammar="bad")
    world.compile()
    world.run()
    assert world.finished[again].reason is FinishReason.LENGTH


def test_a_request_that_is_cancelled_while_it_waits_for_its_grammar_leaves_nothing() -> None:
    world = World()
    gone = world.submit(grammar="a")
    world.cancel(gone)
    world.compile()
    assert world.core.idle
    stays = world.submit(grammar="a")
    world.run()
    assert world.finished[stays].reason is FinishReason.LENGTH


def test_one_that_failed_after_all_who_wanted_it_had_gone_is_tried_again() -> None:
    world = World()
    world.cancel(world.submit(grammar="a"))
    world.compile("what was wrong with it then")
    world.lose_worker()
    world.worker_ready()
    stays = world.submit(grammar="a")
    world.run()
    assert world.finished[stays].reason is FinishReason.LENGTH


def test_a_request_that_waits_too_long_for_its_grammar_ends() -> None:
    world = World(max_wait_seconds=5.0)
    request = world.submit(grammar="a")
    world.wait(6)
    assert world.finished[request].reason is FinishReason.ERROR
    world.compile()
    world.run()


def test_a_preempted_row_names_its_grammar_again() -> None:
    world = World(kv_blocks=6)
    requests = [world.submit([n, n], max_tokens=12, grammar="a") for n in (1, 2)]
    world.compile()
    ids = set()
    while world.worker.steps:
        ids |= {row.grammar_id for row in world.step().new_rows}
    assert world.core.figures().preemptions
    assert ids == {compilations(world)[0].grammar_id}
    for n, request in zip((1, 2), requests, strict=True):
        assert world.tokens[request] == reply(BASE, [n, n], 12, ignore_eos=True)


def test_the_oldest_of_those_that_nobody_has_are_forgotten() -> None:
    world = World()
    held = world.submit(grammar="held", max_tokens=40)
    world.compile()
    for n in range(MAX_IDLE + 3):
        request = world.submit(grammar=f"grammar {n}", max_tokens=1)
        world.compile()
        while request not in world.finished and world.worker.steps:
            world.step()
        if held in world.finished:
            held = world.submit(grammar="held", max_tokens=40)
    by_id = {one.grammar_id: one.source for one in compilations(world)}
    forgotten = [by_id[gone] for one in compilations(world) for gone in one.forget]
    assert forgotten == [f"grammar {n}" for n in range(len(forgotten))]
    assert len(forgotten) == 2


def test_a_worker_that_comes_later_compiles_what_is_waited_for() -> None:
    world = World(started=False)
    request = world.submit(grammar="a")
    assert not world.compiling
    world.worker_ready()
    world.arena_ready()
    world.run()
    assert world.finished[request].reason is FinishReason.LENGTH


def test_whatever_happens_each_request_ends_once_and_nobody_waits_for_ever() -> None:
    draw = random.Random(4)
    world = World(kv_blocks=20)
    open_requests: list[int] = []
    for _ in range(600):
        what = draw.random()
        if what < 0.35:
            grammar = draw.choice(["", "a", "b", "c", str(draw.randrange(100))])
            open_requests.append(world.submit([draw.randrange(9), 1], grammar=grammar))
        elif what < 0.45 and open_requests:
            world.cancel(open_requests.pop(draw.randrange(len(open_requests))))
        elif what < 0.6 and world.compiling:
            world.compile(draw.choice(["", "", "no"]))
        elif world.worker.steps:
            world.step()
    world.run()
    assert set(world.finished) | world.cancelled == set(world.requests)


def test_the_choices_of_a_prompt_wait_for_their_grammar_together() -> None:
    world = World()
    first = world.submit([1, 2], choices=3, grammar="a")
    assert not world.worker.steps
    world.compile()
    world.run()
    assert len(compilations(world)) == 1
    for request in range(first, first + 3):
        assert world.tokens[request] == reply(BASE, [1, 2], 4, ignore_eos=True)
    rows = [new for step in world.worker.run_steps for new in step.new_rows]
    assert {new.grammar_id for new in rows} == {compilations(world)[0].grammar_id}


def test_without_a_prefix_cache_choices_wait_for_their_grammar_too() -> None:
    world = World(prefix_cache=False)
    first = world.submit([1, 2], choices=2, grammar="a")
    assert not world.worker.steps
    world.compile()
    world.run()
    assert {world.finished[one].reason for one in (first, first + 1)} == {FinishReason.LENGTH}


def test_when_the_first_choice_is_cancelled_the_next_waits_for_the_grammar() -> None:
    world = World()
    first = world.submit([1, 2], choices=2, grammar="a")
    world.cancel(first)
    assert not world.worker.steps
    world.compile()
    world.run()
    assert world.finished[first + 1].reason is FinishReason.LENGTH


def test_all_choices_end_when_their_grammar_cannot_be_compiled() -> None:
    world = World()
    first = world.submit([1, 2], choices=2, grammar="bad")
    world.compile("what is wrong with it")
    assert {world.finished[one].reason for one in (first, first + 1)} == {FinishReason.ERROR}
    again = world.submit([1, 2], choices=2, grammar="bad")
    assert len(compilations(world)) == 2  # nothing of it is left
    world.compile()
    world.run()
    assert world.finished[again + 1].reason is FinishReason.LENGTH
