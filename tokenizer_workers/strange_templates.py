"""The thread that waits for templates which nobody vouches for, so that nobody's text waits too.

They are rendered in a process of their own (render.py), one after the other; tenants take turns,
and the adapters of each. A prompt that takes too much time or memory costs that process, and nobody
but its client anything else.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from pipeline.channels import Outbox
from pipeline.config import Settings
from pipeline.framing import receive, send
from pipeline.messages import Failure, FailureKind, Rendered
from tokenizer_workers.render import Job, Result, TemplateLimits
from tokenizer_workers.renderings import ToRender
from tokenizer_workers.turns import Turns

ROOT = Path(__file__).parent.parent  # where this package lies
START_SECONDS = 60.0  # for the process to be ready
KEPT = ("TZ",)  # of the environment, which holds secrets
SLACK_SECONDS = 30.0  # beyond the processor time, on a machine that is busy


class StrangeTemplates:
    """Answers each chat that it is given with Rendered, to the inbox of its own process.

    still_waits  whether anybody waits for a request; asked in the thread
    """

    def __init__(
        self,
        settings: Settings,
        process: str,
        index: int,
        limits: TemplateLimits,
        still_waits: Callable[[int], bool],
    ) -> None:
        self._still_waits = still_waits
        self._closing = False
        self._run_dir = settings.run_folder()
        self._process = process
        self._index = index
        self._renderer = Renderer(
            limits, seconds=settings.template_seconds, nbytes=settings.template_bytes
        )
        self._chats: Turns[ToRender] = Turns()
        self._changed = threading.Condition()  # held by whoever looks at the chats
        self._thread: threading.Thread | None = None

    def render(self, chat: ToRender) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        prompt = chat.prompt
        with self._changed:
            self._chats.put(prompt.tenant, prompt.adapter, chat)
            self._changed.notify()

    def close(self) -> None:
        """What has not been rendered is not any more."""
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify()
            self._renderer.interrupt()
            self._thread.join()

    def _run(self) -> None:
        outbox = Outbox(self._run_dir)
        while (chat := self._next()) is not None:
            prompt = chat.prompt
            if not self._still_waits(prompt.request_id):
                continue
            options = msgspec.structs.replace(prompt.chat_options, template=chat.template)
            job = Job(prompt.chat or [], options, prompt.tools, chat.special_tokens)
            result = self._renderer.render(job)
            message = Rendered(prompt.request_id, result.text, result.failure)
            outbox.send(self._process, message, self._index)
        self._renderer.close()
        outbox.close(0)

    def _next(self) -> ToRender | None:
        """Waits for one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._chats))
            return None if self._closing else self._chats.take()


class Renderer:
    """A process that renders, started when it is needed and after each time it has ended.

    seconds  of processor time for one prompt
    nbytes   of memory
    """

    def __init__(self, limits: TemplateLimits, *, seconds: float, nbytes: int) -> None:
        self._limits = limits
        self._seconds = seconds
        self._nbytes = nbytes
        self._decoder = msgspec.msgpack.Decoder(Result)
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._child is None else self._child.pid

    def render(self, job: Job) -> Result:
        connection = self._connection or self._start()
        connection.settimeout(self._seconds + SLACK_SECONDS)
        try:
            send(connection, msgspec.msgpack.encode(job))
            body, _ = receive(connection)
        except OSError:  # a TimeoutError too
            return self._lost()
        return self._decoder.decode(body)

    def interrupt(self) -> None:
        """From another thread: end what is being rendered."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        child, connection = self._child, self._connection
        self._child = self._connection = None
        if connection is not None:
            connection.close()
        if child is not None:
            child.kill()
            child.wait()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tokenizer_workers.render", str(theirs.fileno())]
            facts = msgspec.json.encode(self._limits).decode()
            self._child = subprocess.Popen(
                [*command, facts, str(self._seconds), str(self._nbytes)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a traceback may have text in it
                pass_fds=[theirs.fileno()],
                env={name: value for name, value in os.environ.items() if name in KEPT}
                | {"PYTHONPATH": str(ROOT)},
            )
        self._connection = ours
        ours.settimeout(START_SECONDS)
        try:
            receive(ours)
        except ConnectionResetError:
            status = self._child.wait()
            raise RuntimeError(f"the process for templates ends with {status}") from None
        return ours

    def _lost(self) -> Result:
        """The process has ended, or does not answer."""
        assert self._child is not None
        assert self._connection is not None
        self._connection.close()  # if it waits for more, it ends now
        self._connection = None
        child, self._child = self._child, None
        try:
            status = child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        sentence = (
            f"the chat template takes more than {self._seconds:g} seconds"
            if status in (-signal.SIGPROF, -signal.SIGKILL)
            else "the chat template cannot be rendered"
        )
        return Result(failure=Failure(422, FailureKind.TEMPLATE, sentence))
