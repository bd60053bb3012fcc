"""What administrators ask of the scheduler, until it has answered."""

import asyncio
import secrets
from typing import TypeVar, cast

import msgspec

from frontend.downstream import SendTo
from pipeline.errors import RequestError
from pipeline.messages import (
    AdapterDescription,
    AdapterList,
    AdminCommand,
    AdminDone,
    FailureKind,
    ListAdapters,
)

COMMAND_BITS = 62  # an id starts anywhere, so that a predecessor's answers find nobody

A = TypeVar("A", AdminDone, AdapterList)


class Commands:
    """The open questions of one frontend. The scheduler answers each of them once.

    send  gives a message to a process, without waiting
    """

    def __init__(self, index: int, send: SendTo) -> None:
        self._index = index
        self._send = send
        self._counter = secrets.randbits(COMMAND_BITS)
        self._open: dict[int, asyncio.Future[AdminDone | AdapterList]] = {}

    async def do(self, command: AdminCommand) -> None:
        """Send it, as a command of this frontend's, and wait until it is done.

        Raises RequestError when it cannot be done.
        """
        done = cast(AdminDone, await self._ask(command))
        if done.failure is not None:
            raise RequestError(done.failure.status, done.failure.kind, done.failure.message)

    async def list(self) -> tuple[AdapterDescription, ...]:
        return cast(AdapterList, await self._ask(ListAdapters(0, 0))).adapters

    def scheduler_started(self) -> None:
        """Another incarnation, which answers nothing that the one before was asked."""
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(
                    RequestError(
                        503,
                        FailureKind.INTERNAL,
                        "The scheduler died before this was done; it may have been, or in part",
                    )
                )

    def answer(self, message: AdminDone | AdapterList) -> None:
        waiting = self._open.get(message.command_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    async def _ask(self, question: AdminCommand | ListAdapters) -> AdminDone | AdapterList:
        self._counter += 1
        command_id = self._counter
        self._open[command_id] = asyncio.get_running_loop().create_future()
        numbered = msgspec.structs.replace(question, command_id=command_id, frontend=self._index)
        self._send("scheduler", numbered, 0)
        try:
            return await self._open[command_id]
        finally:
            del self._open[command_id]
