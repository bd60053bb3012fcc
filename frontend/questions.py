"""What tokenizer workers are asked besides prompts, until they have answered."""

import asyncio
import secrets
from collections.abc import Callable

from pipeline.errors import RequestError
from pipeline.messages import Message, Tokenize, Tokenized

QUESTION_BITS = 62  # an id starts anywhere, so that a predecessor's answers find nobody


class Questions:
    """The open questions of one frontend. Each is answered once.

    send  gives a message to a process, without waiting
    """

    def __init__(self, index: int, send: Callable[[str, Message, int], None]) -> None:
        self._index = index
        self._send = send
        self._counter = secrets.randbits(QUESTION_BITS)
        self._open: dict[int, asyncio.Future[Tokenized]] = {}
        self._asked: dict[int, tuple[Tokenize, int]] = {}  # and which worker

    async def tokenize(self, text: str, *, add_special_tokens: bool, worker: int) -> Tokenized:
        """The tokens of a text. Raises RequestError when they cannot be told."""
        self._counter += 1
        question = Tokenize(self._counter, self._index, text, add_special_tokens)
        answer: asyncio.Future[Tokenized] = asyncio.get_running_loop().create_future()
        self._open[question.question_id] = answer
        self._asked[question.question_id] = question, worker
        try:
            self._send("tokenizer_workers", question, worker)
            tokenized = await answer
        finally:
            del self._open[question.question_id]
            del self._asked[question.question_id]
        if tokenized.failure is not None:
            failure = tokenized.failure
            raise RequestError(failure.status, failure.kind, failure.message)
        return tokenized

    def ask_again(self, worker: int) -> None:
        """A worker has died; the one in its place is asked all that is open."""
        for question, asked in self._asked.values():
            if asked == worker:
                self._send("tokenizer_workers", question, worker)

    def answer(self, message: Tokenized) -> None:
        waiting = self._open.get(message.question_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
