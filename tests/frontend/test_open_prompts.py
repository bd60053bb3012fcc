"""What a tokenizer worker is sent that takes the place of one that has died."""

import asyncio

import msgspec
import pytest

from frontend.downstream import Downstream
from frontend.open_prompts import died
from pipeline.messages import (
    GONE,
    Cancel,
    EndsHeard,
    Message,
    Piece,
    Pieces,
    Prompt,
    PromptDetails,
    StillOpen,
    Tokenize,
    Tokenized,
)
from tests.frontend import test_downstream
from tests.frontend.fakes import end, settings

pytestmark = pytest.mark.anyio


class Sent(test_downstream.Sent):
    """What has been sent since it was asked last."""

    def take(self) -> list[tuple[str, Message, int]]:
        taken = self[:]
        self.clear()
        return taken


def prompt(**given: object) -> Prompt:
    return msgspec.structs.replace(Prompt(0, 0.0, text="Hi"), **given)


def said(request_id: int, produced: int) -> Piece:
    return Piece(request_id, "a", produced=produced)


async def test_all_open_prompts_of_the_worker_are_sent_again_with_what_is_known_of_them() -> None:
    sent = Sent()
    requests = Downstream(settings(tokenizer_workers=2), 0, sent)
    with (
        requests.start(prompt(choices=3), streamed=True),
        requests.start(prompt(), streamed=True),
    ):
        (_, asked, worker), (_, _, other) = sent.take()
        assert (worker, other) == (0, 1)
        assert isinstance(asked, Prompt)
        first = asked.request_id
        requests.deliver(Pieces([said(first, 3), said(first + 1, 7)], (end(first + 1),)))
        requests.deliver(Pieces([said(first, 5)]))
        sent.clear()

        requests.worker_started(0)
        assert sent.take() == [
            ("tokenizer_workers", StillOpen(0, 0, [first, first + 2]), 0),
            ("tokenizer_workers", msgspec.structs.replace(asked, heard=(5, GONE, 0)), 0),
        ]


async def test_the_scheduler_hears_that_ends_have_come() -> None:
    sent = Sent()
    requests = Downstream(settings(), 0, sent)
    requests.deliver(Pieces([said(5, 1), said(7, 1)]))
    assert sent == []
    requests.deliver(Pieces([], (end(5), end(7))))
    assert sent == [("scheduler", EndsHeard([5, 7]), 0)]


async def test_what_nobody_waits_for_is_not_among_the_open_ones() -> None:
    sent = Sent()
    requests = Downstream(settings(), 0, sent)
    with requests.start(prompt(), streamed=True):
        pass
    assert isinstance(sent[-1][1], Cancel)
    sent.clear()
    requests.worker_started(0)
    assert sent == [("tokenizer_workers", StillOpen(0, 0, []), 0)]


async def test_a_prompt_that_was_told_is_not_asked_for_again() -> None:
    sent = Sent()
    requests = Downstream(settings(), 0, sent)
    with requests.start(prompt(prompt_details=True), streamed=True):
        asked = sent.take()[0][1]
        assert isinstance(asked, Prompt)
        requests.worker_started(0)
        assert sent.take()[1][1] == msgspec.structs.replace(asked, heard=(0,))
        requests.tell_prompt(PromptDetails(asked.request_id, "Hi"))
        requests.worker_started(0)
        again = msgspec.structs.replace(asked, heard=(0,), prompt_details=False)
        assert sent.take()[1][1] == again


async def test_a_request_that_may_be_the_cause_of_the_deaths_fails() -> None:
    sent = Sent()
    requests = Downstream(settings(restart_limit=6), 0, sent)
    with requests.start(prompt(), streamed=True) as reply:
        request_id = reply.streams[0].request_id
        for _ in range(2):
            requests.worker_started(0)
        requests.deliver(Pieces([said(request_id, 1)]))  # it is not
        for _ in range(2):
            requests.worker_started(0)
        sent.clear()
        requests.worker_started(0)
        assert sent.take() == [("tokenizer_workers", StillOpen(0, 0, []), 0)]
        [part] = await reply.next()
    assert part.end is not None
    assert part.end.failure == died(3)
    assert sent == []


async def test_questions_are_asked_again() -> None:
    sent = Sent()
    requests = Downstream(settings(tokenizer_workers=2), 0, sent)
    asking = asyncio.create_task(requests.tokenize("Hi", add_special_tokens=True))
    await asyncio.sleep(0)
    [(_, question, worker)] = sent.take()
    assert isinstance(question, Tokenize)
    requests.worker_started(1 - worker)
    assert [type(message) for _, message, _ in sent.take()] == [StillOpen]
    requests.worker_started(worker)
    assert sent.take()[1] == ("tokenizer_workers", question, worker)
    answer = Tokenized(question.question_id, b"")
    requests.tokenized(answer)
    requests.tokenized(answer)  # both workers have said it
    assert await asking == answer
    requests.worker_started(worker)
    assert [type(message) for _, message, _ in sent.take()] == [StillOpen]
