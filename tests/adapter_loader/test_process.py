"""`python -m adapter_loader`, as the scheduler and a frontend see it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from adapter_loader.checkpoint import BaseModel
from pipeline.arena import arena_path, attach, known_arena
from pipeline.channels import Inbox, Outbox
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    AdapterTexts,
    ArenaReady,
    AskTexts,
    FailureKind,
    ForgetAdapter,
    ForgetTexts,
    LoadAdapter,
    Message,
    ProcessReady,
    ReleaseAdapter,
    Shutdown,
    Stats,
    ToFrontend,
    ToScheduler,
    ToTokenizerWorker,
)
from tests.adapter_loader.adapters import (
    base_config,
    change_config,
    delta_weights,
    make_adapter,
    unpacked,
)
from tests.adapter_loader.web_server import Served, web_server

M = TypeVar("M", bound=Message)
ARENA_BYTES = 1 << 20
WAIT_SECONDS = 60


class Running:
    """The process, with the inboxes of its peers."""

    def __init__(self, folder: Path, root: Path, **settings: object) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.root = root
        base_config().save_pretrained(folder / "model")
        values = {
            "run_dir": self.run_dir,
            "model_folder": folder / "model",
            "adapter_root": root,
            "arena_bytes": ARENA_BYTES,
            "cache": folder / "cache",
            "stats_seconds": 0.05,
            **settings,
        }
        environment = {key: value for key, value in os.environ.items() if "LORADEX" not in key}
        environment |= {f"LORADEX_{key.upper()}": str(value) for key, value in values.items()}
        with ExitStack() as opened:
            self.scheduler: Inbox[ToScheduler] = Inbox(self.run_dir, "scheduler", 0, ToScheduler)
            opened.callback(self.scheduler.close)
            self.frontend: Inbox[ToFrontend] = Inbox(self.run_dir, "frontend", 0, ToFrontend)
            opened.callback(self.frontend.close)
            self.tokenizer_worker: Inbox[ToTokenizerWorker] = Inbox(
                self.run_dir, "tokenizer_workers", 0, ToTokenizerWorker
            )
            opened.callback(self.tokenizer_worker.close)
            self.outbox = Outbox(self.run_dir)
            opened.callback(self.outbox.close, 0)
            for process in (
                "scheduler",
                "frontend",
                "tokenizer_workers",
            ):  # who is not known, is told nothing
                peer = Outbox(self.run_dir, Incarnation(process))
                opened.callback(peer.close, 0)
                peer.greet("adapter_loader")
            with (folder / "log").open("w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "adapter_loader"],
                    env=environment | {"HF_HUB_ETAG_TIMEOUT": "100"},
                    stderr=log,
                )
            opened.callback(self.process.wait)
            opened.callback(self.process.kill)
            self._opened = opened.pop_all()
        self.log = folder / "log"
        self._received: list[Message] = []

    def close(self) -> None:
        self._opened.close()

    def send(self, message: Message) -> None:
        self.outbox.send("adapter_loader", message)

    def receive(self, kind: type[M]) -> M:
        """The next message of this kind to the scheduler."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for message in self._received:
                if isinstance(message, kind):
                    self._received.remove(message)
                    return message
            self._received += self.scheduler.receive(1000)
            assert self.process.poll() is None, self.log.read_text()
        raise AssertionError(f"no {kind.__name__} has come: {self.log.read_text()}")

    def load(self, name: str, source: str = "local") -> None:
        self.send(LoadAdapter(AdapterKey(source, name)))

    def staged(self, name: str) -> AdapterStaged:
        """Load an adapter and wait for it."""
        self.load(name)
        message = self.receive(AdapterStaged)
        assert message.adapter.id == name
        return message

    def texts(self, name: str, **known: Any) -> AdapterTexts:
        """Ask for an adapter's files for tokenizers, and wait for them."""
        self.send(AskTexts(5, 0, AdapterKey("local", name), **known))
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for message in self.tokenizer_worker.receive(1000):
                if isinstance(message, AdapterTexts):
                    return message
        raise AssertionError(f"no texts have come: {self.log.read_text()}")

    def shut_down(self) -> int:
        self.send(Shutdown("scheduler"))
        return self.process.wait(WAIT_SECONDS)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    with ExitStack() as running:

        def start(root: Path, **settings: object) -> Running:
            process = Running(tmp_path_factory.mktemp("p"), root, **settings)
            running.callback(process.close)
            return process

        yield start


@pytest.fixture(scope="module")
def loader(
    start: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory, good_adapter: Path
) -> Iterator[Running]:
    """A process for the tests that leave it as it was."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(good_adapter, root / "good")
    shutil.copytree(good_adapter, root / "bad")
    change_config(root / "bad", use_dora=True)
    running = start(root)
    ready = running.receive(ArenaReady)
    assert ready == ArenaReady(str(arena_path(running.run_dir)), ARENA_BYTES)
    yield running
    assert running.shut_down() == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_staged_adapter_lies_in_the_arena_as_peft_would_add_it(
    loader: Running, base: BaseModel
) -> None:
    adapted = make_adapter(loader.root / "mine", r=6, use_rslora=True)
    staged = loader.staged("mine")
    arena = attach(arena_path(loader.run_dir), ARENA_BYTES)
    extent = arena[staged.arena_offset : staged.arena_offset + staged.nbytes]
    arena.close()
    deltas = unpacked(extent, staged.ranks, base)
    expected = delta_weights(adapted)
    assert deltas.keys() == expected.keys()
    assert all(deltas[place].allclose(expected[place], atol=1e-5) for place in expected)
    loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_an_adapter_that_has_not_changed_is_staged_again_at_its_place(loader: Running) -> None:
    first, second = loader.staged("good"), loader.staged("good")
    assert first == second
    for staged in (first, second):
        loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_an_adapter_that_has_changed_has_another_content(loader: Running) -> None:
    shutil.copytree(loader.root / "good", loader.root / "changing")
    first = loader.staged("changing")
    change_config(loader.root / "changing", lora_alpha=5)
    second = loader.staged("changing")
    assert first.content != second.content
    assert first.arena_offset != second.arena_offset, "the first is still leased"
    for staged in (first, second):
        loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_what_an_adapter_ships_for_tokenizers_is_told_and_known_again(loader: Running) -> None:
    folder = loader.root / "shipping"
    shutil.copytree(loader.root / "good", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    told = loader.texts("shipping")
    assert (told.question_id, told.adapter.id, told.failure) == (5, "shipping", None)
    assert told.files == {"chat_template.jinja": b"{{ messages }}", "tokenizer.json": b"{}"}
    assert loader.texts("shipping", known=told.version).files is None
    (folder / "chat_template.jinja").write_text("{{ other }}")
    again = loader.texts("shipping", known=told.version, known_tokenizers=(told.tokenizer,))
    assert again.files == {"chat_template.jinja": b"{{ other }}"}
    missing = loader.texts("missing").failure
    assert missing is not None
    assert (missing.status, missing.message[:13]) == (404, "there is no s")


def test_a_worker_is_told_to_forget_what_the_scheduler_has_forgotten(loader: Running) -> None:
    key = AdapterKey("local", "good")
    loader.send(ForgetAdapter(key))
    loader.receive(AdapterDropped)
    assert loader.tokenizer_worker.receive(WAIT_SECONDS * 1000) == [ForgetTexts(key)]


def test_a_bad_adapter_fails_alone(loader: Running) -> None:
    for name in ("bad", "good", "missing", "bad"):
        loader.load(name)
    failures = [loader.receive(AdapterFailed) for _ in range(3)]
    kinds = sorted((message.adapter.id, message.failure.kind) for message in failures)
    invalid, missing = FailureKind.ADAPTER_INVALID, FailureKind.ADAPTER_NOT_FOUND
    assert kinds == [("bad", invalid), ("bad", invalid), ("missing", missing)]
    staged = loader.receive(AdapterStaged)
    assert staged.adapter.id == "good"
    loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_a_source_that_there_is_not_is_refused(loader: Running) -> None:
    loader.load("good", source="moon")
    failure = loader.receive(AdapterFailed).failure
    assert (failure.kind, failure.status) == (FailureKind.ADAPTER_INVALID, 422)
    assert "moon" in failure.message


def test_a_lease_that_was_not_given_is_ignored(loader: Running) -> None:
    loader.send(ReleaseAdapter(AdapterKey("local", "nobody"), 4096))
    staged = loader.staged("good")
    loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_a_frontend_is_told_that_it_is_ready_and_how_it_does(loader: Running) -> None:
    staged = loader.staged("good")
    ready, samples = False, dict[str, float]()
    deadline = time.monotonic() + WAIT_SECONDS
    while not (ready and samples.get("loradex_adapter_loads_total")):
        assert time.monotonic() < deadline
        for message in loader.frontend.receive(1000):
            ready = ready or isinstance(message, ProcessReady)
            if isinstance(message, Stats):
                for _, _, _, family in message.families:
                    samples.update({name: value for name, _, value in family})
    assert samples["loradex_arena_used_bytes"] >= staged.nbytes
    assert samples["loradex_arena_adapters"] >= 1
    assert "loradex_adapter_load_stage_seconds_count" in samples
    loader.send(ReleaseAdapter(staged.adapter, staged.arena_offset))


def test_a_silent_hub_holds_up_neither_local_adapters_nor_the_end(
    start: Callable[..., Running], good_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        running = start(good_adapter.parent, loader_threads=1, adapter_load_seconds=2)
        for name in ("some/one", "some/other"):
            running.load(name, source="hub")
        assert running.staged(good_adapter.name).arena_offset == 0
        for _ in range(2):
            failed = running.receive(AdapterFailed)
            assert failed.failure.status == 503
            assert "within 2 seconds" in failed.failure.message
        arena = arena_path(running.run_dir)
        assert arena.exists()
        assert running.shut_down() == 0
    assert not arena.exists()
    left = sorted(path.name for path in running.run_dir.iterdir())
    assert left == ["frontend.0.sock", "scheduler.0.sock", "tokenizer_workers.0.sock"]
    assert "Traceback" not in running.log.read_text()


def test_a_stalled_web_server_holds_up_no_other(
    start: Callable[..., Running], good_adapter: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, web_server() as good:
        for path in good_adapter.iterdir():
            good.files[f"/x/{path.name}"] = Served(path.read_bytes())
        stalled = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = start(
            good_adapter.parent,
            loader_threads=1,
            adapter_load_seconds=2,
            http_host=f"{stalled},{good.url}",
        )
        for name in ("a", "b"):
            running.load(f"{stalled}/{name}", source="http")
        running.load(f"{good.url}/x", source="http")
        assert running.receive(AdapterStaged).adapter.id == f"{good.url}/x"
        failed = [running.receive(AdapterFailed).failure for _ in range(2)]
        assert [failure.status for failure in failed] == [503, 503]
        assert running.shut_down() == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("http_host", "ftp://x"), ("http_host", "host/path"), ("pbase_gateway", "https://alone")],
)
def test_a_source_that_cannot_be_set_up_ends_it_with_a_sentence(
    start: Callable[..., Running], tmp_path: Path, setting: str, value: str
) -> None:
    running = start(tmp_path, **{setting: value})
    assert running.process.wait(WAIT_SECONDS) == 2
    assert f"loradex: {setting}: " in running.log.read_text()


def test_a_setting_that_cannot_be_met_ends_it_with_a_sentence(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start(tmp_path, model_folder=tmp_path / "nothing")
    assert running.process.wait(WAIT_SECONDS) == 2
    assert "loradex: model_id: cannot read" in running.log.read_text()
    assert known_arena(running.run_dir) is None
