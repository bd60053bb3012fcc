"""Sockets between processes: order, patience, and deafness to what is malformed."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pipeline.channels import MAX_RECEIVED, Inbox, Outbox, address
from pipeline.messages import AdapterKey, Cancel, Message, Prefetch, Shutdown, Submit

WAIT_MS = 10_000
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
    encode = msgspec.msgpack.encode
    stranger = Prefetch(AdapterKey("hub", "secret"))
    with caplog.at_level(logging.ERROR):
        send_bytes(
            tmp_path,
            b"",
            b"\xc1 secret",
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
