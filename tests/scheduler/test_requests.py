"""The life of a request: its tokens, its one end, its usage."""

import math
from array import array

import pytest

from pipeline.logprobs import pack
from pipeline.messages import (
    FailureKind,
    FinishReason,
    Logprobs,
    Step,
    StepDone,
    Submit,
    Tokens,
    WorkerReady,
)
from scheduler.core import Scheduler
from tests.scheduler.fake_worker import BASE, BROKEN, EOS, next_token, reply
from tests.scheduler.world import SETTINGS, World


def prompt_that_ends_after(tokens: int) -> list[int]:
    """A prompt whose reply has its EOS in this place, counted from 1."""
    return next(
        [n, 1]
        for n in range(1, 10_000)
        if reply(BASE, [n, 1], 64).index(EOS) + 1 == tokens  # each of them ends some time
    )


def messages_to_workers(world: World) -> list[Tokens]:
    return [message for _, _, message in world.sent if isinstance(message, Tokens)]


def test_a_request_gets_its_tokens_and_ends_at_its_length() -> None:
    world = World()
    request = world.submit([1, 2, 3], max_tokens=9)
    world.run()
    assert world.tokens[request] == reply(BASE, [1, 2, 3], 9, ignore_eos=True)
    assert world.finished[request].reason is FinishReason.LENGTH


def test_eos_ends_a_request_and_is_its_last_token() -> None:
    world = World()
    request = world.submit(prompt_that_ends_after(5), max_tokens=20, ignore_eos=False)
    world.run()
    assert len(world.tokens[request]) == 5
    assert world.tokens[request][-1] == EOS
    assert world.finished[request].reason is FinishReason.EOS


def test_eos_is_a_token_like_others_when_it_is_to_be_ignored() -> None:
    world = World()
    request = world.submit(prompt_that_ends_after(5), max_tokens=20, ignore_eos=True)
    world.run()
    assert len(world.tokens[request]) == 20


def test_eos_in_the_last_place_is_an_eos() -> None:
    world = World()
    request = world.submit(prompt_that_ends_after(5), max_tokens=5, ignore_eos=False)
    world.run()
    assert world.finished[request].reason is FinishReason.EOS


def test_a_request_for_one_token_needs_one_step() -> None:
    world = World()
    request = world.submit(max_tokens=1)
    world.run()
    assert world.finished[request].usage.completion_tokens == 1
    assert len(world.worker.run_steps) == 1


def test_requests_queue_until_the_worker_is_ready() -> None:
    world = World(started=False)
    request = world.submit()
    assert not world.worker.steps
    world.worker_ready()
    world.run()
    assert world.finished[request].reason is FinishReason.LENGTH


def test_the_base_model_needs_no_arena() -> None:
    world = World(started=False)
    world.worker_ready()
    request = world.submit()
    world.run()
    assert world.finished[request].reason is FinishReason.LENGTH
    assert not world.arena_attached


def test_a_cancelled_request_ends_silently_and_gives_back_its_blocks_at_once() -> None:
    world = World()
    request = world.submit(max_tokens=20)
    world.step()
    world.cancel(request)
    assert world.core.figures().kv_blocks_used == 0
    world.run()
    assert request not in world.finished
    assert len(world.tokens[request]) == 1


def test_a_request_can_be_cancelled_while_it_waits() -> None:
    world = World(rows=1)
    world.submit(max_tokens=20)
    waiting = world.submit()
    world.cancel(waiting)
    world.run()
    assert world.tokens[waiting] == []
    assert waiting not in world.finished


def test_cancelling_what_is_unknown_or_over_does_nothing() -> None:
    world = World()
    request = world.submit()
    world.run()
    world.cancel(request)
    world.cancel(4711)
    assert world.core.idle


def test_a_request_that_needs_more_blocks_than_there_are_is_refused() -> None:
    world = World(kv_blocks=3, block_tokens=4)
    fits = world.submit(range(1, 9), max_tokens=5)  # the last token needs no place
    does_not = world.submit(range(1, 9), max_tokens=6)
    world.run()
    assert world.finished[fits].reason is FinishReason.LENGTH
    failure = world.finished[does_not].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (422, FailureKind.VALIDATION)
    assert "4 KV blocks, the server has 3" in failure.message


def test_a_request_that_came_before_the_worker_is_refused_when_its_size_is_known() -> None:
    world = World(kv_blocks=3, block_tokens=4, started=False)
    request = world.submit(range(1, 9), max_tokens=6)
    assert request not in world.finished
    world.worker_ready()
    assert world.finished[request].reason is FinishReason.ERROR
    world.run()


def test_a_request_that_cannot_start_in_time_ends_with_503() -> None:
    world = World(rows=1, max_wait_seconds=60)
    running = world.submit(max_tokens=40)
    world.wait(10)
    waiting = world.submit()
    assert world.core.next_deadline() == 70
    world.wait(60)
    failure = world.finished[waiting].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (503, FailureKind.TIMEOUT)
    world.run()
    assert world.finished[running].reason is FinishReason.LENGTH


def test_nothing_is_due_when_all_have_started() -> None:
    world = World()
    world.submit()
    assert world.core.next_deadline() is None


def test_logits_that_are_not_finite_end_the_request_with_a_sentence() -> None:
    world = World()
    request = world.submit(adapter="sql")
    world.stage(content=BROKEN)
    world.run()
    failure = world.finished[request].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (422, FailureKind.ADAPTER_INVALID)
    assert "adapter sql" in failure.message


def test_a_base_model_that_gives_no_finite_logits_is_our_fault() -> None:
    core = Scheduler(settings=SETTINGS, eos_token_ids=())
    core.worker_ready(WorkerReady(8, 4, 1024, 4, 4), 0.0)
    core.submit(Submit(1, 0, 0.0, array("i", [5]).tobytes(), max_tokens=3), 0.0)
    assert core.next_work(0.0) is not None
    core.step_done(StepDone(1, array("i", [-1]).tobytes()), 0.0)
    [(_, _, message)] = core.take_outbox()
    assert isinstance(message, Tokens)
    assert message.token_ids == []
    failure = message.finished[0].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (500, FailureKind.INTERNAL)


def test_usage_counts_tokens_and_measures_from_the_arrival() -> None:
    world = World(rows=1)
    world.submit(max_tokens=2)
    request = world.submit([1, 2, 3], max_tokens=2)
    world.now = 5.0
    world.step()
    world.step()  # the row is free, and given to the second
    world.now = 7.0
    world.step()
    world.now = 8.0
    world.step()
    usage = world.finished[request].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 2, 0)
    assert (usage.queue_seconds, usage.first_token_seconds, usage.total_seconds) == (5.0, 7.0, 8.0)


def test_a_reply_of_eos_alone_has_a_time_to_its_first_token() -> None:
    world = World()
    request = world.submit(prompt_that_ends_after(1), ignore_eos=False)
    world.now = 3.0
    world.run()
    assert world.finished[request].usage.first_token_seconds == 3.0


def test_each_tokenizer_worker_gets_one_message_per_step() -> None:
    world = World(tokenizer_workers=2, started=False)
    for number in range(4):
        world.submit([number + 1], worker=number % 2, max_tokens=1)
    world.worker_ready()
    world.step()
    first, second = messages_to_workers(world)
    assert first.request_ids == [end.request_id for end in first.finished] == [1, 3]
    assert second.request_ids == [end.request_id for end in second.finished] == [2, 4]


def test_the_tokens_of_a_message_belong_to_the_request_beside_them() -> None:
    world = World()
    first = world.submit([1], max_tokens=6)
    second = world.submit([2], max_tokens=6)
    world.run()
    assert world.tokens[first] == reply(BASE, [1], 6, ignore_eos=True)
    assert world.tokens[second] == reply(BASE, [2], 6, ignore_eos=True)
    assert next_token(BASE, [1]) != next_token(BASE, [2])


@pytest.mark.parametrize("wanted", [True, False])
def test_logprobs_travel_beside_their_tokens(wanted: bool) -> None:
    core = Scheduler(settings=SETTINGS, eos_token_ids=())
    core.worker_ready(WorkerReady(8, 4, 1024, 4, 4), 0.0)
    prompt = array("i", [5]).tobytes()
    asked = Logprobs() if wanted else None
    core.submit(Submit(1, 0, 0.0, prompt, max_tokens=3, logprobs=asked), 0.0)
    step = core.next_work(0.0)
    assert isinstance(step, Step)
    assert step.new_rows[0].logprobs == asked
    logprobs = pack(-0.5, []) if wanted else b""
    core.step_done(StepDone(1, array("i", [7]).tobytes(), logprobs), 0.0)
    [(_, _, message)] = core.take_outbox()
    assert message == Tokens([1], [7], {0: pack(-0.5, [])} if wanted else {})


def test_a_step_that_is_reported_out_of_order_is_a_defect() -> None:
    world = World()
    world.submit()
    with pytest.raises(RuntimeError, match="step 2 is done before step 1"):
        world.core.step_done(StepDone(2, b""), 0.0)


def test_times_are_never_negative_for_a_request_that_never_ran() -> None:
    world = World(rows=1, max_wait_seconds=1)
    world.submit(max_tokens=40)
    request = world.submit()
    world.wait(2)
    usage = world.finished[request].usage
    assert usage.first_token_seconds == 0.0
    assert math.isclose(usage.queue_seconds, 2.0)
    world.run()
