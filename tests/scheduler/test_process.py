"""The process itself, among neighbours that are this test."""

import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings, to_environment
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterKey,
    AdapterPlaced,
    AdapterStaged,
    ArenaReady,
    AttachArena,
    Cancel,
    FinishReason,
    LoadAdapter,
    Message,
    PlaceAdapter,
    Prefetch,
    ProcessReady,
    ReleaseAdapter,
    Shutdown,
    Stats,
    Step,
    StepDone,
    Submit,
    ToAdapterLoader,
    ToFrontend,
    ToGpuWorker,
    Tokens,
    ToTokenizerWorker,
    WorkerReady,
)

WAIT_SECONDS = 30
EOS = 2
SQL = AdapterKey("local", "sql")
UNIONS = {
    "frontend": ToFrontend,
    "tokenizer_workers": ToTokenizerWorker,
    "gpu_worker": ToGpuWorker,
    "adapter_loader": ToAdapterLoader,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "eos_token_id": EOS,
}

M = TypeVar("M", bound=Message)


class Neighbours:
    """The scheduler's process, and the inboxes of all the others."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        run_dir, model_folder, self._log = folder / "run", folder / "model", folder / "log"
        run_dir.mkdir(mode=0o700)
        model_folder.mkdir()
        (model_folder / "config.json").write_text(json.dumps(CONFIG))
        self.run_dir = run_dir
        self._inboxes: dict[str, Inbox[Message]] = {
            process: Inbox(run_dir, process, 0, union) for process, union in UNIONS.items()
        }
        self._outbox = Outbox(run_dir)
        self._peers = [Outbox(run_dir, Incarnation(process)) for process in UNIONS]
        for peer in self._peers:  # who is not known, is told nothing
            peer.greet("scheduler")
        self._arrived: dict[str, list[Message]] = {process: [] for process in UNIONS}
        chosen = Settings(run_dir=str(run_dir), model_folder=str(model_folder), **settings)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scheduler"],
                env=os.environ | to_environment(chosen),
                stderr=log,
            )

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._outbox.send("scheduler", message)

    def next(self, process: str, kind: type[M]) -> M:
        """The next message of that kind to that process; others are passed over."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            over = self.process.poll() is not None or time.monotonic() > deadline
            self._arrived[process] += self._inboxes[process].receive(timeout_ms=100)
            while self._arrived[process]:
                message = self._arrived[process].pop(0)
                if isinstance(message, kind):
                    return message
            assert not over, f"no {kind.__name__} has come:\n{self._log.read_text()}"

    def start_up(self) -> None:
        self.send(WorkerReady(64, 4, 4096, 4, 4), ArenaReady("/dev/shm/arena", 1 << 20))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for outbox in (self._outbox, *self._peers):
            outbox.close(linger_ms=0)
        for inbox in self._inboxes.values():
            inbox.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Neighbours]]:
    started: list[Neighbours] = []

    def begin(**settings: Any) -> Neighbours:
        started.append(Neighbours(tmp_path, **settings))
        return started[-1]

    yield begin
    for neighbours in started:
        neighbours.close()


def submit(request_id: int = 1, **given: Any) -> Submit:
    request = {"max_tokens": 3, "arrived": time.monotonic(), **given}
    return Submit(request_id, 0, token_ids=array("i", [5, 6]).tobytes(), **request)


def answer(neighbours: Neighbours, *token_ids: int) -> Step:
    """Do the next step with these tokens."""
    step = neighbours.next("gpu_worker", Step)
    neighbours.send(StepDone(step.step_id, array("i", token_ids).tobytes()))
    return step


def test_a_request_goes_through_and_the_process_ends_after_the_last(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start()
    neighbours.start_up()
    ready = neighbours.next("frontend", ProcessReady)
    assert ready.facts == {"kv_blocks": 64, "kv_block_tokens": 4, "adapter_pool_bytes": 4096}
    neighbours.send(submit(), Shutdown("tokenizer_workers"))
    answer(neighbours, 9)
    assert neighbours.next("tokenizer_workers", Tokens) == Tokens([1], [9], {})
    answer(neighbours, EOS)
    tokens = neighbours.next("tokenizer_workers", Tokens)
    assert tokens.token_ids == [EOS]
    assert tokens.finished[0].reason is FinishReason.EOS
    answer(neighbours, 9)  # the surplus row
    assert neighbours.next("gpu_worker", Shutdown) == Shutdown("scheduler")
    assert neighbours.next("adapter_loader", Shutdown) == Shutdown("scheduler")
    assert neighbours.process.wait(WAIT_SECONDS) == 0
    assert not (neighbours.run_dir / "scheduler.0.sock").exists()


def test_an_adapter_is_loaded_copied_and_released(start: Callable[..., Neighbours]) -> None:
    neighbours = start()
    neighbours.send(Prefetch(SQL, "secret"))
    neighbours.start_up()
    assert neighbours.next("adapter_loader", LoadAdapter) == LoadAdapter(SQL, "secret")
    neighbours.send(AdapterStaged(SQL, "digest", 8192, 700, b"\x08\x00" * 7))
    assert neighbours.next("gpu_worker", AttachArena) == AttachArena("/dev/shm/arena", 1 << 20)
    placing = neighbours.next("gpu_worker", PlaceAdapter)
    assert placing.copy.arena_offset == 8192
    neighbours.send(AdapterPlaced(placing.copy.slot))
    assert neighbours.next("adapter_loader", ReleaseAdapter) == ReleaseAdapter(SQL, 8192)


def test_a_deadline_passes_without_a_message(start: Callable[..., Neighbours]) -> None:
    neighbours = start(max_wait_seconds=0.2, stats_seconds=3600)
    neighbours.send(submit())
    tokens = neighbours.next("tokenizer_workers", Tokens)
    assert tokens.finished[0].reason is FinishReason.ERROR


def test_metrics_are_sent_while_nothing_happens(start: Callable[..., Neighbours]) -> None:
    neighbours = start(stats_seconds=0.1)
    stats = neighbours.next("frontend", Stats)
    assert (stats.process, stats.index) == ("scheduler", 0)
    assert "loradex_requests_running" in [family[0] for family in stats.families]


def test_it_ends_at_once_when_every_tokenizer_worker_is_done(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start(tokenizer_workers=2)
    neighbours.send(submit(), Cancel(1))
    neighbours.send(Shutdown("tokenizer_workers", 0), Shutdown("tokenizer_workers", 1))
    assert neighbours.process.wait(WAIT_SECONDS) == 0


def test_a_model_without_config_ends_it_with_a_sentence(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"), model_folder=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "scheduler"],
        env=os.environ | to_environment(settings),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "model_id: cannot read" in result.stderr
