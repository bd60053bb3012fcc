"""Sockets between processes: order, patience, and deafness to what is malformed."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pipeline.channels import MAX_RECEIVED, Inbox, Outbox, address
from pipeline.incarnation import Incarnation
from pipeline.messages import AdapterKey, Cancel, Message, PeerStarted, Prefetch, Shutdown, Submit

WAIT_MS = 10_000
ENVELOPE_BYTES = 18
Union = Cancel | Shutdown


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    box = Outbox(tmp_path)
    yield box
    box.close(linger_ms=0)


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox[Message]]:
    box: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, Union)
    yield box
    box.close()


def received(inbox: Inbox[Message], count: int) -> list[Any]:
    messages: list[Any] = []
    while len(messages) < count:
        batch = inbox.receive(WAIT_MS)
        assert batch, f"only {len(messages)} of {count} messages came"
        messages += batch
    return messages


def send_bytes(run_dir: Path, *frames: bytes) -> None:
    """As a process of another version might."""
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.connect(address(run_dir, "scheduler"))
        for frame in frames:
            push.send(frame)
        push.close(linger=WAIT_MS)


def test_messages_arrive_in_the_order_they_were_sent(outbox: Outbox, inbox: Inbox[Message]) -> None:
    count = 3 * MAX_RECEIVED + 1
    for number in range(count):
        outbox.send("scheduler", Cancel(number))
    assert received(inbox, count) == [Cancel(number) for number in range(count)]


def test_one_look_takes_a_bounded_number_of_messages(outbox: Outbox, inbox: Inbox[Message]) -> None:
    for number in range(2 * MAX_RECEIVED):
        outbox.send("scheduler", Cancel(number))
    outbox.send("scheduler", Shutdown("last"))
    sizes: list[int] = []
    while sum(sizes) < 2 * MAX_RECEIVED + 1:
        sizes.append(len(inbox.receive(WAIT_MS)))
    assert max(sizes) <= MAX_RECEIVED


def test_what_is_sent_before_the_peer_binds_waits_for_it(tmp_path: Path, outbox: Outbox) -> None:
    outbox.send("scheduler", Cancel(1))
    outbox.send("scheduler", Cancel(2))
    late: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, Union)
    assert received(late, 2) == [Cancel(1), Cancel(2)]
    late.close()


def test_each_index_of_a_process_has_its_own_inbox(tmp_path: Path, outbox: Outbox) -> None:
    boxes: list[Inbox[Message]] = [Inbox(tmp_path, "frontend", index, Union) for index in (0, 1)]
    outbox.send("frontend", Cancel(10), 0)
    outbox.send("frontend", Cancel(11), 1)
    assert [received(box, 1) for box in boxes] == [[Cancel(10)], [Cancel(11)]]
    for box in boxes:
        box.close()


def test_nothing_is_waited_for_when_nothing_may_be_waited_for(inbox: Inbox[Message]) -> None:
    assert inbox.receive(timeout_ms=0) == []
    assert inbox.receive(timeout_ms=1) == []


def test_what_is_malformed_is_dropped_and_logged_without_its_content(
    tmp_path: Path, inbox: Inbox[Message], caplog: pytest.LogCaptureFixture
) -> None:
    def encode(message: object) -> bytes:
        return bytes(ENVELOPE_BYTES) + msgspec.msgpack.encode(message)

    stranger = Prefetch(AdapterKey("hub", "secret"))
    with caplog.at_level(logging.ERROR):
        send_bytes(
            tmp_path,
            b"",
            bytes(ENVELOPE_BYTES) + b"\xc1 secret",
            encode(["Cancel", "secret"]),
            encode(stranger),  # a message, but not one for this inbox
            encode(Cancel(1)),
        )
        assert received(inbox, 1) == [Cancel(1)]
    refused = [record.getMessage() for record in caplog.records]
    assert len(refused) == 4
    assert all(line.startswith("event=message_refused bytes=") for line in refused)
    assert not any("secret" in line for line in refused)


def test_a_closed_inbox_leaves_no_file_and_a_dead_ones_file_is_replaced(
    tmp_path: Path, outbox: Outbox
) -> None:
    path = Path(address(tmp_path, "scheduler").removeprefix("ipc://"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()

    inbox: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, Union)
    outbox.send("scheduler", Cancel(1))
    assert received(inbox, 1) == [Cancel(1)]
    inbox.close()
    assert not path.exists()


def test_closing_the_outbox_waits_for_what_is_on_its_way(
    tmp_path: Path, inbox: Inbox[Message]
) -> None:
    outbox = Outbox(tmp_path)
    for number in range(1000):
        outbox.send("scheduler", Cancel(number))
    outbox.close()
    assert len(received(inbox, 1000)) == 1000


def test_a_watched_inbox_calls_for_each_message_in_order(
    tmp_path: Path, outbox: Outbox, inbox: Inbox[Message]
) -> None:
    count = 3 * MAX_RECEIVED
    seen: list[Message] = []

    async def watch() -> None:
        complete = asyncio.Event()

        def on_message(message: Message) -> None:
            seen.append(message)
            if len(seen) == 1:  # while the first batch is dealt with
                for number in range(count // 2, count):
                    outbox.send("scheduler", Cancel(number))
            if len(seen) == count:
                complete.set()

        for number in range(count // 2):
            outbox.send("scheduler", Cancel(number))
        inbox.watch(asyncio.get_running_loop(), on_message)
        await asyncio.wait_for(complete.wait(), WAIT_MS / 1000)
        inbox.close()

    asyncio.run(watch())
    assert seen == [Cancel(number) for number in range(count)]


def test_a_watched_inbox_may_be_closed_after_its_loop(
    tmp_path: Path, outbox: Outbox, inbox: Inbox[Message]
) -> None:
    async def watch() -> None:
        inbox.watch(asyncio.get_running_loop(), lambda message: None)

    asyncio.run(watch())
    inbox.close()
    assert not list(tmp_path.iterdir())


def test_a_message_of_megabytes_arrives_whole(tmp_path: Path, outbox: Outbox) -> None:
    inbox: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, Submit | Cancel)
    submit = Submit(1, 0, 0.0, token_ids=bytes(range(256)) * 40_000, max_tokens=1)
    outbox.send("scheduler", submit)
    assert received(inbox, 1) == [submit]
    inbox.close()


# --- incarnations ---------------------------------------------------------------------------------


class Speaker:
    """One incarnation of a process: its inbox, if it has one, and its outbox."""

    def __init__(self, run_dir: Path, process: str, number: int, *, deaf: bool = False) -> None:
        self.outbox = Outbox(run_dir, Incarnation(process, number=number))
        self._inbox: Inbox[Message] | None = None
        if not deaf:
            self._inbox = Inbox(run_dir, process, 0, Union, self.outbox)

    def receive(self) -> list[Message]:
        assert self._inbox is not None
        return self._inbox.receive(WAIT_MS)

    def hears_nothing(self) -> bool:
        assert self._inbox is not None
        return self._inbox.receive(50) == []

    def say(self, process: str, number: int) -> None:
        self.outbox.send(process, Cancel(number))

    def die(self) -> None:
        """Without a word; what it has not read is lost with it."""
        if self._inbox is not None:
            self._inbox.close()
        self.outbox.close(linger_ms=0)


Speak = Callable[..., Speaker]


@pytest.fixture
def speak(tmp_path: Path) -> Iterator[Speak]:
    speakers: list[Speaker] = []

    def start(process: str, number: int, **how: bool) -> Speaker:
        speakers.append(Speaker(tmp_path, process, number, **how))
        return speakers[-1]

    yield start
    for speaker in speakers:
        speaker.die()


def acquainted(speak: Speak) -> tuple[Speaker, Speaker]:
    """A scheduler and a GPU worker that know of each other."""
    scheduler, worker = speak("scheduler", 1), speak("gpu_worker", 2)
    worker.outbox.greet("scheduler")
    assert scheduler.receive() == [PeerStarted("gpu_worker", 0, again=False)]
    assert worker.receive() == [PeerStarted("scheduler", 0, again=False)]
    return scheduler, worker


def test_what_is_for_a_peer_that_nobody_has_heard_of_waits_for_it(speak: Speak) -> None:
    scheduler = speak("scheduler", 1)
    scheduler.say("gpu_worker", 7)
    worker = speak("gpu_worker", 2)
    assert worker.hears_nothing()
    worker.outbox.greet("scheduler")
    assert scheduler.receive() == [PeerStarted("gpu_worker", 0, again=False)]
    messages = worker.receive()
    while len(messages) < 2:
        messages += worker.receive()
    assert messages == [PeerStarted("scheduler", 0, again=False), Cancel(7)]


def test_what_was_meant_for_a_dead_peer_is_not_taken_by_its_successor(speak: Speak) -> None:
    scheduler = speak("scheduler", 1)
    scheduler.outbox.heard_of(("gpu_worker", 0), 2)  # which has died before it could read this
    scheduler.say("gpu_worker", 7)
    successor = speak("gpu_worker", 3)  # binds the same address
    assert successor.receive() == [PeerStarted("scheduler", 0, again=False)]
    successor.outbox.greet("scheduler")
    assert scheduler.receive() == [PeerStarted("gpu_worker", 0, again=True)]
    scheduler.say("gpu_worker", 8)
    assert successor.receive() == [Cancel(8)]


def test_what_a_dead_peer_has_said_comes_before_its_successor_or_never(speak: Speak) -> None:
    scheduler, worker = acquainted(speak)
    successor = speak("gpu_worker", 3, deaf=True)
    worker.say("scheduler", 7)
    assert scheduler.receive() == [Cancel(7)]
    successor.outbox.greet("scheduler")
    assert scheduler.receive() == [PeerStarted("gpu_worker", 0, again=True)]
    worker.say("scheduler", 8)
    assert scheduler.hears_nothing()


def test_a_list_of_messages_ends_where_an_incarnation_does(speak: Speak) -> None:
    """So that answers to the first two are not sent to the successor."""
    scheduler, worker = acquainted(speak)
    worker.say("scheduler", 7)
    worker.say("scheduler", 8)
    assert scheduler.receive() == [Cancel(7), Cancel(8)] or scheduler.receive() == [Cancel(8)]
    raw = Outbox(worker.outbox._run_dir, Incarnation("gpu_worker", number=2))
    raw.heard_of(("scheduler", 0), 1)
    raw.send("scheduler", Cancel(9))
    raw._incarnation = Incarnation("gpu_worker", number=3)  # over the same socket, so in order
    raw._envelopes.clear()
    raw.send("scheduler", Cancel(10))
    messages = [scheduler.receive()]
    while not any(Cancel(10) in batch for batch in messages):
        messages.append(scheduler.receive())
    raw.close()
    assert messages == [[Cancel(9)], [PeerStarted("gpu_worker", 0, again=True), Cancel(10)]]


def test_those_who_do_not_say_who_they_are_are_heard(
    speak: Speak, outbox: Outbox, inbox: Inbox[Message]
) -> None:
    worker = speak("gpu_worker", 2)
    outbox.send("gpu_worker", Cancel(1))
    assert worker.receive() == [Cancel(1)]
    worker.outbox.heard_of(("scheduler", 0), 99)
    worker.say("scheduler", 2)
    assert received(inbox, 1) == [Cancel(2)]


def test_what_waits_for_an_unknown_peer_is_left_to_it_at_the_end(
    speak: Speak, tmp_path: Path
) -> None:
    scheduler = Outbox(tmp_path, Incarnation("scheduler", number=1))
    scheduler.send("gpu_worker", Cancel(1))
    worker = speak("gpu_worker", 2)
    scheduler.close()
    assert worker.receive() == [PeerStarted("scheduler", 0, again=False), Cancel(1)]


def test_a_list_of_a_watched_inbox_ends_there_too(speak: Speak, tmp_path: Path) -> None:
    seen: list[Message] = []

    async def watch() -> None:
        done = asyncio.Event()
        outbox = Outbox(tmp_path, Incarnation("scheduler", number=1))
        inbox: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, Union, outbox)
        said = Outbox(tmp_path, Incarnation("gpu_worker", number=2))
        said.heard_of(("scheduler", 0), 1)
        said.send("scheduler", Cancel(1))
        said._incarnation = Incarnation("gpu_worker", number=3)
        said._envelopes.clear()
        said.send("scheduler", Cancel(2))

        def on_message(message: Message) -> None:
            seen.append(message)
            if message == Cancel(2):
                done.set()

        inbox.watch(asyncio.get_running_loop(), on_message)
        await asyncio.wait_for(done.wait(), WAIT_MS / 1000)
        inbox.close()
        for box in (said, outbox):
            box.close(linger_ms=0)

    asyncio.run(watch())
    assert seen == [
        PeerStarted("gpu_worker", 0, again=False),
        Cancel(1),
        PeerStarted("gpu_worker", 0, again=True),
        Cancel(2),
    ]
