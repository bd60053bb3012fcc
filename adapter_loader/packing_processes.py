"""Processes that pack adapters: the threads of one would wait for each other's lock.

Packing is thousands of short calls for each adapter, between which a thread takes the interpreter's
lock; 8 threads of one process pack fewer adapters than 4 (docs/performance.md). So each thread of
the loader hands what it packs to a process of its own: open files and a plan go there, a digest or
an error comes back, and the bytes are in the arena. If such a process dies, its adapter fails, and
no other.

They are forked by a process without threads, the nursery, which is itself forked before the loader
has any: so they cost no second import of torch, at the start or later.
"""

import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn

import msgspec
from prometheus_client import Counter

from adapter_loader.loading import AnyPlan, fill
from adapter_loader.workers import give_way
from pipeline.arena import attach
from pipeline.errors import RequestError
from pipeline.framing import receive, send
from pipeline.metrics import REGISTRY
from pipeline.parent import die_with_parent

MOST_PROCESSES = 8  # unless a setting says otherwise

log = logging.getLogger(__name__)

DEATHS = Counter(
    "loradex_packing_process_deaths_total",
    "Processes that pack adapters which have died and were replaced",
    registry=REGISTRY,
)


class _Job(msgspec.Struct, frozen=True):
    """Pack this, from the files that come with it."""

    plan: AnyPlan
    offset: int  # bytes in the arena
    nbytes: int


class _Packed(msgspec.Struct, frozen=True, tag=True):
    content: str


class _Refused(msgspec.Struct, frozen=True, tag=True):
    """A RequestError on its way."""

    status: int
    kind: str
    message: str


class _Broken(msgspec.Struct, frozen=True, tag=True):
    """Our mistake, which is in the log."""


_Result = _Packed | _Refused | _Broken
_encode = msgspec.msgpack.encode
_job_decoder = msgspec.msgpack.Decoder(_Job)
_result_decoder: msgspec.msgpack.Decoder[_Result] = msgspec.msgpack.Decoder(_Result)


class PackingProcessDiedError(Exception):
    """It was killed, or ran out of memory; another has taken its place."""


class Nursery:
    """Forks the processes. Must be made while this process has one thread."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()  # of the control socket
        with theirs:
            self.pid = _fork(partial(_serve_nursery, theirs), closes=self._control)

    def new(self, arena: Path, nbytes: int) -> socket.socket:
        """The loader's end of a conversation with a new process, which maps the arena at first.

        If the nursery itself is dead, so is this process: whatever packed has died with it.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                send(self._control, _encode((str(arena), nbytes)), [theirs.fileno()])
            except OSError:
                log.critical("event=nursery_died")
                os._exit(1)
        return ours

    def close(self) -> None:
        """All processes that it has forked end with it."""
        self._control.close()
        os.waitpid(self.pid, 0)


class PackingProcesses:
    """As many adapters at a time as there are processes. Safe for as many threads."""

    def __init__(self, nursery: Nursery, arena: Path, nbytes: int, count: int) -> None:
        """The arena exists, and has `nbytes` bytes; a count of 0 is what suits the machine."""
        self.count = count or min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))
        self._new = partial(nursery.new, arena, nbytes)
        self._idle: SimpleQueue[socket.socket] = SimpleQueue()
        for _ in range(self.count):
            self._idle.put(self._new())

    def pack(self, plan: AnyPlan, weights: Sequence[int], offset: int) -> str:
        """Fill the extent at `offset`, as `loading.fill`; waits until a process has done it.

        weights  descriptors of the files, which stay open here
        raises   RequestError as `fill` does; PackingProcessDiedError
        """
        peer = self._idle.get()
        try:
            send(peer, _encode(_Job(plan, offset, plan.placed.nbytes)), weights)
            result = _result_decoder.decode(receive(peer)[0])
        except OSError as error:
            DEATHS.inc()
            peer.close()
            peer = self._new()
            raise PackingProcessDiedError("while it packed this adapter") from error
        finally:
            self._idle.put(peer)
        match result:
            case _Packed():
                return result.content
            case _Refused():
                raise RequestError(result.status, result.kind, result.message)
            case _Broken():
                raise RuntimeError("a packing process has logged why")

    def close(self) -> None:
        """Hang up on those that have nothing to do; to be called when nobody packs any more."""
        with suppress(Empty):
            while True:
                self._idle.get_nowait().close()


# --- in the nursery, and in the processes ---


def _serve_nursery(control: socket.socket) -> None:
    """Fork whenever one is asked for, until the loader hangs up."""
    gc.freeze()  # what is there now is for ever, and its pages stay shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries what ends
    with suppress(OSError):
        while True:
            data, (descriptor,) = receive(control)
            path, nbytes = msgspec.msgpack.decode(data, type=tuple[str, int])
            with socket.socket(fileno=descriptor) as theirs:
                _fork(partial(_serve, theirs, Path(path), nbytes), closes=control)


def _serve(peer: socket.socket, arena: Path, nbytes: int) -> None:
    """Pack one adapter after another, until the loader hangs up."""
    give_way()
    extents = memoryview(attach(arena, nbytes))
    with suppress(OSError):
        while True:
            data, files = receive(peer)
            try:
                job = _job_decoder.decode(data)
                extent = extents[job.offset : job.offset + job.nbytes]
                result = _fill(job.plan, files, extent)
            finally:
                for file in files:
                    os.close(file)
            send(peer, _encode(result))


def _fill(plan: AnyPlan, weights: Sequence[int], extent: memoryview) -> _Result:
    try:
        return _Packed(fill(plan, weights, extent))
    except RequestError as error:
        return _Refused(error.status, error.kind, error.message)
    except Exception:
        log.exception("event=packing_broken")
        return _Broken()


def _fork(child: Callable[[], None], closes: socket.socket) -> int:
    """Its pid. The child closes that socket, and dies when this process does."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_child(parent, child, closes)
    return pid


def _be_child(parent: int, child: Callable[[], None], closes: socket.socket) -> NoReturn:
    """Nothing of the parent's may run here: no handlers of signals, and no `finally` at the end."""
    try:
        die_with_parent()
        for ignored in (signal.SIGTERM, signal.SIGINT):  # the loader hangs up when it ends
            signal.signal(ignored, signal.SIG_IGN)
        if os.getppid() == parent:
            closes.close()
            child()
    except BaseException:
        log.exception("event=packing_process_broken")
        os._exit(1)
    os._exit(0)
