"""The frontend: the HTTP server, and what it is told by the other processes.

It is where the end of everything begins: SIGTERM drains it, and Shutdown flows from it.
"""

import asyncio
import contextlib
import functools
import json
import logging
import math
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from typing import assert_never

import uvicorn
import uvloop
from starlette.applications import Starlette

from frontend.app import make_administration, make_app
from frontend.commands import Commands
from frontend.connections import Connection
from frontend.downstream import Downstream
from frontend.processes import Processes
from frontend.slow_readers import bound_kernel_buffers
from frontend.tracing import make_tracing
from pipeline.adapter_roots import find_local
from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterList,
    AdminDone,
    Aliases,
    PeerStarted,
    Pieces,
    ProcessDied,
    ProcessReady,
    PromptDetails,
    Spans,
    Stats,
    ToFrontend,
    Tokenized,
)
from pipeline.metrics import snapshot
from pipeline.process import run

PROCESS = "frontend"
BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE_SECONDS = 75  # of a connection without a request; longer than clients keep theirs
CLOSE_SECONDS = 1  # for connections to end, once everything has been answered
SAMPLE_ADAPTER = "pirate"  # the ready line shows it, where there is one
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # listened on -> reached at

log = logging.getLogger(__name__)


def main(settings: Settings, incarnation: Incarnation) -> None:
    index = incarnation.index
    listener = listen(settings)
    outbox = Outbox(settings.run_folder(), incarnation)
    inbox: Inbox[ToFrontend] = Inbox(settings.run_folder(), PROCESS, index, ToFrontend, outbox)
    try:
        uvloop.run(serve(settings, incarnation, listener, inbox, outbox))
    finally:
        outbox.close()
        inbox.close()


def listen(settings: Settings) -> socket.socket:
    """The socket that clients connect to; from now on they wait. Raises ConfigError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.frontends > 1:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound_kernel_buffers(listener)
        listener.bind(place)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"port: cannot listen on {settings.host}:{settings.port}: {reason}"
        ) from error
    return listener


async def serve(
    settings: Settings,
    incarnation: Incarnation,
    listener: socket.socket,
    inbox: Inbox[ToFrontend],
    outbox: Outbox,
) -> None:
    """Serve until SIGTERM has come and all is drained."""
    index = incarnation.index
    loop = asyncio.get_running_loop()
    processes = Processes(settings)
    downstream = Downstream(settings, index, outbox.send)
    commands = Commands(index, outbox.send)
    administration = make_administration(
        settings, downstream=downstream, processes=processes, commands=commands
    )
    tracing = make_tracing(settings, os.environ)
    app = make_app(
        settings,
        index,
        downstream=downstream,
        processes=processes,
        administration=administration,
        tracing=tracing,
    )

    was_ready = False

    def everybody_is_ready() -> None:
        nonlocal was_ready
        if was_ready:
            log.info("event=ready_again")
        elif index == 0:
            print(ready_line(settings, listener), flush=True)
        was_ready = True

    def peer_started(message: PeerStarted) -> None:
        processes.died(message.process, message.index)
        if message.process == "tokenizer_workers":
            downstream.worker_started(message.index)
        if message.process == "scheduler":
            downstream.scheduler_started()
            commands.scheduler_started()
            if index == 0:
                beside.append(asyncio.create_task(administration.preload()))

    def receive(message: ToFrontend) -> None:
        match message:
            case Pieces():
                downstream.deliver(message)
            case PromptDetails():
                downstream.tell_prompt(message)
            case Tokenized():
                downstream.tokenized(message)
            case Stats():
                processes.stats(message)
            case Spans():
                if tracing is not None:
                    tracing.record(message)
            case ProcessReady():
                if processes.ready(message):
                    everybody_is_ready()
            case ProcessDied():
                peer = (message.process, message.index)
                if outbox.known(peer) <= message.number:  # else its successor has come already
                    processes.died(*peer, message.cause)
                    if message.process == "tokenizer_workers":
                        downstream.admission.worker_died(message.index)
            case PeerStarted():
                if message.again:
                    peer_started(message)
            case Aliases():
                downstream.aliases.replace(message)
            case AdminDone() | AdapterList():
                commands.answer(message)
            case _:
                assert_never(message)

    asked_to_stop = _on_sigterm(loop)
    beside = [
        asyncio.create_task(_report_to_others(settings, index, outbox)),
        asyncio.create_task(_live(incarnation)),
    ]
    if index == 0:
        beside.append(asyncio.create_task(administration.preload()))
    inbox.watch(loop, receive)
    greet(settings, outbox)
    server = Server(server_config(app, settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({serving, asked_to_stop}, return_when=asyncio.FIRST_COMPLETED)
    log.info("event=draining in_flight=%d", downstream.admission.in_flight)
    await downstream.drain(settings.drain_seconds)
    for task in beside:
        task.cancel()
    downstream.shut_down()
    server.should_exit = True
    await serving
    if tracing is not None:
        await asyncio.to_thread(tracing.close)


def greet(settings: Settings, outbox: Outbox) -> None:
    """Whoever had to do with a predecessor of this frontend starts over, and says what it is."""
    outbox.greet("tokenizer_workers", settings.tokenizer_workers)
    for process in ("scheduler", "gpu_worker", "adapter_loader"):
        outbox.greet(process)
    outbox.greet(PROCESS, settings.frontends)


def ready_line(settings: Settings, listener: socket.socket) -> str:
    """Where the server is, and a command to try it with."""
    host = EVERY_ADDRESS.get(settings.host, settings.host)
    url = f"http://{host}:{listener.getsockname()[1]}"
    sample = find_local(settings.adapter_roots(), SAMPLE_ADAPTER)
    body = {
        "model": SAMPLE_ADAPTER if sample else settings.model_id,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 60,
    }
    return (
        f"loradex is ready at {url} - try: curl {url}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def _on_sigterm(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Done when SIGTERM has come. The deadline that pipeline.process sets on it stays."""
    asked: asyncio.Future[None] = loop.create_future()
    set_deadline = signal.getsignal(signal.SIGTERM)

    def came() -> None:
        if callable(set_deadline):
            set_deadline(signal.SIGTERM, None)
        if not asked.done():
            asked.set_result(None)

    loop.add_signal_handler(signal.SIGTERM, came)
    return asked


async def _report_to_others(settings: Settings, index: int, outbox: Outbox) -> None:
    """Whichever frontend is asked for metrics shows those of all."""
    others = [other for other in range(settings.frontends) if other != index]
    while others:
        await asyncio.sleep(settings.stats_seconds)
        for other in others:
            outbox.send(PROCESS, Stats(PROCESS, index, snapshot()), other)


async def _live(incarnation: Incarnation) -> None:
    """Give signs of life."""
    incarnation.beat()
    while incarnation.beat_seconds < math.inf:
        await asyncio.sleep(incarnation.beat_seconds)
        incarnation.beat()


class Server(uvicorn.Server):
    """Signals are ours: uvicorn would stop listening on the first, while we still say 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(app: Starlette, settings: Settings) -> uvicorn.Config:
    connection = functools.partial(
        Connection,
        request_seconds=settings.request_seconds,
        slow_reader_seconds=settings.slow_reader_seconds,
    )
    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]  # it is called as the class would be
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        backlog=BACKLOG,
    )


if __name__ == "__main__":
    run(PROCESS, main)
