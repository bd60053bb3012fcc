"""The process itself: `python -m gpu_worker` between real sockets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline.arena import create
from pipeline.channels import Inbox, Outbox
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterPlaced,
    AttachArena,
    NewRow,
    PlaceAdapter,
    ProcessReady,
    Shutdown,
    Stats,
    Step,
    StepDone,
    ToFrontend,
    ToScheduler,
    WorkerReady,
)
from tests.gpu_worker.driving import GREEDY, Driver, ints, make_worker, prompt
from tests.gpu_worker.packing import Packed, arena_of

TIMEOUT_MS = 60_000


class Peers(NamedTuple):
    """The worker's neighbours, played by the test."""

    process: "subprocess.Popen[bytes]"
    scheduler: Inbox[ToScheduler]
    frontend: Inbox[ToFrontend]
    outbox: Outbox
    run_dir: Path


@pytest.fixture
def peers(tmp_path: Path, llama_folder: Path) -> Iterator[Peers]:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    settings = {
        "RUN_DIR": str(run_dir),
        "MODEL_FOLDER": str(llama_folder),
        "KV_CACHE_BYTES": "1000000",
        "KV_BLOCK_TOKENS": "4",
        "STATS_SECONDS": "0.05",
        "DEVICE": "cpu",
    }
    environment = {**os.environ, **{f"LORADEX_{name}": text for name, text in settings.items()}}
    scheduler = Inbox[Any](run_dir, "scheduler", 0, ToScheduler)
    frontend = Inbox[Any](run_dir, "frontend", 0, ToFrontend)
    outbox = Outbox(run_dir)
    neighbours = [Outbox(run_dir, Incarnation(one)) for one in ("scheduler", "frontend")]
    for neighbour in neighbours:  # who is not known, is told nothing
        neighbour.greet("gpu_worker")
    process = subprocess.Popen([sys.executable, "-m", "gpu_worker"], env=environment)
    yield Peers(process, scheduler, frontend, outbox, run_dir)
    process.kill()
    process.wait()
    for box in (outbox, *neighbours):
        box.close(0)
    scheduler.close()
    frontend.close()


def another_scheduler(peers: Peers) -> None:
    """The one before has died."""
    outbox = Outbox(peers.run_dir, Incarnation("scheduler"))
    outbox.greet("gpu_worker")
    outbox.close()


def receive(inbox: Inbox[Any], count: int, timeout_ms: int = TIMEOUT_MS) -> list[Any]:
    messages: list[Any] = []
    while len(messages) < count:
        arrived = inbox.receive(timeout_ms)
        assert arrived, "nothing came"
        messages += arrived
    return messages


def test_it_gets_ready_runs_steps_in_order_and_leaves(
    peers: Peers, llama_folder: Path, packed_adapters: list[Packed]
) -> None:
    (ready,) = receive(peers.scheduler, 1)
    assert isinstance(ready, WorkerReady)
    assert ready.block_tokens == 4

    staged, copies = arena_of(packed_adapters)
    path = peers.run_dir / "arena"
    with create(path, 1 << 20) as arena:
        arena[: len(staged)] = staged[:]
    tokens = prompt(1, 6)
    row = NewRow(2, 2, ints(tokens), 6, 0, ints([3, 1, 2]), GREEDY, None)
    chunk = np.array([[2, 0, 6]], np.int32).tobytes()
    peers.outbox.send("gpu_worker", AttachArena(str(path), 1 << 20))
    for copy in copies:
        peers.outbox.send("gpu_worker", PlaceAdapter(copy))
    peers.outbox.send("gpu_worker", Step(1, prefill=chunk, new_rows=(row,)))
    for step_id in range(2, 5):  # all sent before the first is answered
        peers.outbox.send("gpu_worker", Step(step_id, decode_rows=ints([2])))
    *placed, first, second, third, fourth = receive(peers.scheduler, 7)
    assert placed == [AdapterPlaced(slot) for slot in range(3)]

    worker = make_worker(llama_folder)
    worker.attach_arena(staged)
    driver = Driver(worker)
    driver.step(copies=copies)
    expected = driver.add(0, tokens, slot=2)
    driver.generate([0], 4)
    assert [first, second, third, fourth] == [
        StepDone(step_id, ints([token])) for step_id, token in enumerate(expected.produced, start=1)
    ]

    announced, *others = receive(peers.frontend, 2)
    assert isinstance(announced, ProcessReady)
    assert announced.facts["dtype"] == "torch.float32"
    assert all(isinstance(message, Stats) for message in others)

    another_scheduler(peers)
    assert receive(peers.scheduler, 1) == [ready]
    with pytest.raises(AssertionError, match="nothing came"):
        receive(peers.scheduler, 1, timeout_ms=50)  # nothing is answered that the first has asked
    peers.outbox.send("gpu_worker", AttachArena(str(path), 1 << 20))
    for copy in copies:
        peers.outbox.send("gpu_worker", PlaceAdapter(copy))
    peers.outbox.send("gpu_worker", Step(1, prefill=chunk, new_rows=(row,)))
    *_, again = receive(peers.scheduler, 4)
    assert again == first

    peers.outbox.send("gpu_worker", Shutdown("scheduler"))
    assert peers.process.wait(timeout=30) == 0
    assert sorted(path.name for path in peers.run_dir.glob("*.sock")) == [
        "frontend.0.sock",
        "scheduler.0.sock",
    ]
