"""Whatever bytes come to an inbox, each is a message or one line in the log, and nothing else."""

import logging
import typing
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.channels import PROCESSES, Inbox, Outbox, address
from pipeline.incarnation import Incarnation
from pipeline.messages import Message, ProcessReady, Shutdown
from tests.pipeline.test_messages import MEMBERS, UNIONS, instances

WAIT_MS = 10_000
REFUSED = "event=message_refused bytes="

Boxes = dict[str, tuple[Inbox[Message], Outbox]]


class Refusals(logging.Handler):
    """The lines that inboxes have logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def refusals() -> Iterator[Refusals]:
    handler = Refusals()
    logger = logging.getLogger("pipeline.channels")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    """One inbox of each process, and a sender to it."""
    folder = tmp_path_factory.mktemp("run")
    made: Boxes = {
        name: (Inbox(folder, name, 0, union), Outbox(folder)) for name, union in UNIONS.items()
    }
    yield made
    for inbox, outbox in made.values():
        outbox.close(0)
        inbox.close()


def last_of(name: str) -> Message:
    """A message for this inbox."""
    return ProcessReady("test") if name == "frontend" else Shutdown("test")


def told(boxes: Boxes, name: str, frames: list[bytes]) -> list[Message]:
    """What the inbox gives of the frames, in front of the message that is sent behind them."""
    inbox, outbox = boxes[name]
    for frame in frames:
        outbox.send(name, typing.cast(Message, msgspec.Raw(frame)))
    last = last_of(name)
    outbox.send(name, last)
    received: list[Message] = []
    while not received or received[-1] != last:
        received += inbox.receive(WAIT_MS)
    return received[:-1]


def assert_dropped_or_read(
    boxes: Boxes, refusals: Refusals, name: str, frames: list[bytes]
) -> list[Message]:
    refusals.lines.clear()
    received = told(boxes, name, frames)
    assert all(isinstance(message, typing.get_args(UNIONS[name])) for message in received)
    assert len(received) + len(refusals.lines) == len(frames)
    for line in refusals.lines:
        assert line.startswith(REFUSED)
        assert "\n" not in line
        assert len(line) < 500
    return received


STRANGE = (
    b"\x91" * 100_000,  # arrays in arrays
    b"\x92\xa6Cancel" + b"\x91" * 100_000,
    b"\x92\xa8Shutdown\xa3\xff\xfe\xfd",  # text that is not UTF-8
    b"\x92\xa6Cance\xff\x01",
    b"\x92\xa8Shutdown\xa3\xed\xa0\x80",  # half of a surrogate pair
    b"\xdd\xff\xff\xff\xff",  # an array, a text, bytes and a map of 4 GiB
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff" + bytes(9),
    b"\xdf\xff\xff\xff\xff",
    b"\x92\xa6Cancel\xc7\x08\x01" + bytes(8),  # an extension
    b"\xc1",
    b"\x80",
    b"\x93\xa8Shutdown\xa1x",  # shorter than it says
    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",  # a pickle
)


@pytest.mark.parametrize("name", UNIONS)
def test_what_is_strange_is_a_line_each(boxes: Boxes, refusals: Refusals, name: str) -> None:
    assert assert_dropped_or_read(boxes, refusals, name, list(STRANGE)) == []


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(UNIONS)),
    frames=st.lists(st.binary(min_size=1, max_size=80), max_size=20),
)
def test_any_bytes_are_a_line_or_a_message(
    boxes: Boxes, refusals: Refusals, name: str, frames: list[bytes]
) -> None:
    assert_dropped_or_read(boxes, refusals, name, frames)


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_message_that_was_cut_or_changed_is_a_line_or_a_message(
    boxes: Boxes, refusals: Refusals, name: str, kind: type[Message], data: st.DataObject
) -> None:
    whole = msgspec.msgpack.encode(data.draw(instances(kind)))
    cuts = [whole[:length] for length in range(1, min(len(whole), 60))]
    changes = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))
    changed = [
        whole[:place] + bytes([value]) + whole[place + 1 :]
        for place, value in data.draw(st.lists(changes, max_size=20))
    ]
    received = assert_dropped_or_read(boxes, refusals, name, [*cuts, *changed])
    assert len(received) <= len(changed), "a part of a message was taken for one"


def test_bytes_that_are_no_message_are_not_believed_who_has_sent_them(
    tmp_path: Path, refusals: Refusals
) -> None:
    """Else whom they name by chance would not be heard any more."""
    ours, theirs = (
        Outbox(tmp_path, Incarnation(name, number=7)) for name in ("scheduler", "frontend")
    )
    inbox: Inbox[Message] = Inbox(tmp_path, "scheduler", 0, UNIONS["scheduler"], ours)
    theirs.greet("scheduler")
    theirs.heard_of(("scheduler", 0), 7)
    theirs.send("scheduler", Shutdown("first"))
    received: list[Message] = []
    while Shutdown("first") not in received:
        received += inbox.receive(WAIT_MS)
    refusals.lines.clear()
    sender = b"\xff" * 8 + (7).to_bytes(8, "little") + bytes([PROCESSES.index("frontend"), 0])
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    with push:
        push.connect(address(tmp_path, "scheduler"))
        push.send(sender + b"\xc1 no message")
        while not refusals.lines:
            assert inbox.receive(100) == []
        push.close(linger=WAIT_MS)
    theirs.send("scheduler", Shutdown("last"))
    assert inbox.receive(WAIT_MS) == [Shutdown("last")]
    for box in (ours, theirs):
        box.close(0)
    inbox.close()
