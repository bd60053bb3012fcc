"""What a request sends on its way, and what becomes of it when it is left."""

import asyncio
from typing import Any

import pytest

from frontend.calls import Part
from frontend.downstream import CUT_OFF, Downstream
from frontend.exchange import ClientGone
from pipeline.errors import RequestError
from pipeline.messages import (
    REQUEST_BITS,
    AdapterKey,
    Cancel,
    Message,
    Pieces,
    Prefetch,
    Prompt,
    PromptDetails,
    Sampling,
    Shutdown,
)
from tests.frontend.fakes import end, failure, piece, settings

pytestmark = pytest.mark.anyio


class Sent(list[tuple[str, Message, int]]):
    """A send that keeps what it is given."""

    def __call__(self, process: str, message: Message, index: int) -> None:
        self.append((process, message, index))

    def messages(self, kind: type[Message]) -> list[Any]:
        return [message for _, message, _ in self if isinstance(message, kind)]


def downstream(
    sent: Sent, *, index: int = 0, keep_alive: float = 15.0, **changes: Any
) -> Downstream:
    return Downstream(settings(**changes), index, sent, keep_alive_seconds=keep_alive)


def prompt(adapter: AdapterKey | None = None) -> Prompt:
    return Prompt(0, 0.0, text="Hi", adapter=adapter, adapter_token="t" if adapter else None)


async def test_a_prompt_gets_a_number_of_its_frontend_and_a_time() -> None:
    sent = Sent()
    requests = downstream(sent, index=3)
    for _ in range(2):
        with requests.start(prompt(), streamed=True):
            pass
    first, second = sent.messages(Prompt)
    assert first.request_id >> REQUEST_BITS == second.request_id >> REQUEST_BITS == 3
    assert first.request_id != second.request_id
    assert 0 < first.arrived <= second.arrived
    assert (first.text, first.sampling) == ("Hi", Sampling())


async def test_its_adapter_is_announced_before_it() -> None:
    sent = Sent()
    key = AdapterKey("hub", "x")
    with downstream(sent).start(prompt(key), streamed=True):
        assert sent[0] == ("scheduler", Prefetch(key, "t"), 0)
        assert isinstance(sent[1][1], Prompt)


async def test_prompts_go_to_the_worker_with_the_least_to_do_and_cancels_follow_them() -> None:
    sent = Sent()
    requests = downstream(sent, tokenizer_workers=2)
    with requests.start(prompt(), streamed=True), requests.start(prompt(), streamed=True):
        pass
    assert [(type(message), index) for _, message, index in sent] == [
        (Prompt, 0),
        (Prompt, 1),
        (Cancel, 1),
        (Cancel, 0),
    ]


async def test_what_comes_while_nobody_looks_is_taken_at_once() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(prompt(), streamed=True) as reply:
        request_id = sent.messages(Prompt)[0].request_id
        requests.deliver(Pieces([piece("a", request_id)]))
        requests.deliver(Pieces([piece("b", request_id)], (end(request_id),)))
        parts = await reply.next()
    assert parts == [Part(0, [piece("a", request_id), piece("b", request_id)], end(request_id))]
    assert sent.messages(Cancel) == []


async def test_a_waiting_task_is_woken() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(prompt(), streamed=True) as reply:
        request_id = sent.messages(Prompt)[0].request_id
        waiting = asyncio.create_task(reply.next())
        await asyncio.sleep(0)
        requests.deliver(Pieces([piece("a", request_id), piece("b", request_id)]))
        parts = await waiting
    assert parts == [Part(0, [piece("a", request_id), piece("b", request_id)])]


async def test_a_client_that_goes_is_heard_of_at_once_and_its_request_is_cancelled() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(prompt(), streamed=False) as reply:
        waiting = asyncio.create_task(reply.next())
        await asyncio.sleep(0)
        reply.client_gone()
        with pytest.raises(ClientGone):
            await waiting
    (started,) = sent.messages(Prompt)
    assert sent.messages(Cancel) == [Cancel(started.request_id)]
    assert requests.admission.in_flight == 0
    requests.deliver(Pieces([piece("late", started.request_id)], (end(started.request_id),)))


async def test_a_place_is_free_again_however_a_request_is_left() -> None:
    requests = downstream(Sent(), max_concurrent_requests=1)

    def break_off() -> None:
        with requests.start(prompt(), streamed=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    with requests.start(prompt(), streamed=True), pytest.raises(RequestError):
        requests.admission.enter()
    assert requests.admission.in_flight == 0


async def test_places_are_shared_out_to_the_frontends() -> None:
    requests = downstream(Sent(), max_concurrent_requests=3, frontends=2)
    with requests.start(prompt(), streamed=True), pytest.raises(RequestError):
        requests.admission.enter()


async def test_silence_is_broken_again_and_again() -> None:
    with downstream(Sent(), keep_alive=0.01).start(prompt(), streamed=True) as reply:
        assert await reply.next() == []
        assert await reply.next() == []


async def test_a_drain_waits_for_those_that_run() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(prompt(), streamed=True) as reply:
        draining = asyncio.create_task(requests.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(RequestError):
            requests.admission.enter()
        assert not draining.done()
        request_id = sent.messages(Prompt)[0].request_id
        requests.deliver(Pieces([], (end(request_id),)))
        await reply.next()
    await draining
    assert sent.messages(Cancel) == []


async def test_a_drain_cuts_off_what_runs_too_long() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(prompt(), streamed=True) as reply:
        draining = asyncio.create_task(requests.drain(0))
        [part] = await reply.next()
    await draining
    assert part.end is not None
    assert part.end.failure == CUT_OFF
    (started,) = sent.messages(Prompt)
    assert sent.messages(Cancel) == [Cancel(started.request_id)]


def several() -> tuple[Prompt, Prompt]:
    """Two prompts of two choices each."""
    one = Prompt(0, 0.0, text="Hi", adapter=AdapterKey("hub", "a/b"), choices=2)
    return one, Prompt(0, 0.0, text="Ho", adapter=AdapterKey("hub", "a/b"), choices=2)


async def test_the_choices_of_a_call_have_ids_of_their_own_and_one_place() -> None:
    sent = Sent()
    requests = downstream(sent, max_concurrent_requests=1)
    with requests.start(*several(), streamed=True) as reply:
        assert requests.admission.in_flight == 1
        with pytest.raises(RequestError):
            requests.admission.enter()
        first, second = sent.messages(Prompt)
        assert second.request_id == first.request_id + 2
        assert len(sent.messages(Prefetch)) == 1
        third = second.request_id
        requests.deliver(Pieces([piece("c", third), piece("b", third - 1)], (end(third - 1),)))
        parts = await reply.next()
    assert parts == [
        Part(1, [piece("b", third - 1)], end(third - 1)),
        Part(2, [piece("c", third)]),
    ]
    open_ids = [first.request_id, third, third + 1]
    assert sent.messages(Cancel) == [Cancel(request_id) for request_id in open_ids]
    assert requests.admission.in_flight == 0


async def test_the_ids_of_the_next_request_follow_those_of_all_choices() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(*several(), streamed=True), requests.start(prompt(), streamed=True):
        ids = [one.request_id for one in sent.messages(Prompt)]
    assert ids[2] == ids[0] + 4


async def test_a_call_that_is_not_streamed_waits_for_all_choices() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(several()[0], streamed=False) as reply:
        [asked] = sent.messages(Prompt)
        waiting = asyncio.create_task(reply.next())
        await asyncio.sleep(0)
        requests.deliver(Pieces([], (end(asked.request_id),)))
        await asyncio.sleep(0)
        assert not waiting.done()
        requests.deliver(Pieces([], (end(asked.request_id + 1),)))
        parts = await waiting
    assert [part.end for part in parts] == [end(asked.request_id), end(asked.request_id + 1)]


async def test_or_for_one_that_has_failed() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(several()[0], streamed=False) as reply:
        [asked] = sent.messages(Prompt)
        failed = end(asked.request_id + 1, failure=failure())
        requests.deliver(Pieces([], (failed,)))
        [part] = await reply.next()
    assert part.end == failed
    assert sent.messages(Cancel) == [Cancel(asked.request_id)]


async def test_a_prompts_details_are_beside_what_comes_of_each_of_its_choices() -> None:
    sent = Sent()
    requests = downstream(sent)
    with requests.start(*several(), streamed=True) as reply:
        first = sent.messages(Prompt)[0].request_id
        details = PromptDetails(first, "Hi")
        requests.tell_prompt(details)
        requests.deliver(Pieces([piece("a", first + number) for number in range(3)]))
        parts = await reply.next()
    assert [part.prompt for part in parts] == [details, details, None]


async def test_a_drain_of_nothing_is_over_at_once() -> None:
    await downstream(Sent()).drain(60)


async def test_every_tokenizer_worker_is_told_of_the_end() -> None:
    sent = Sent()
    downstream(sent, index=1, frontends=2, tokenizer_workers=2).shut_down()
    assert sent == [
        ("tokenizer_workers", Shutdown("frontend", 1), 0),
        ("tokenizer_workers", Shutdown("frontend", 1), 1),
    ]
