"""The process itself, between a frontend and a scheduler that are this test."""

import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings, to_environment
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterKey,
    AdapterTexts,
    AskTexts,
    Cancel,
    ChatOptions,
    End,
    Finished,
    FinishReason,
    Message,
    Pieces,
    ProcessReady,
    Prompt,
    Resumed,
    Shutdown,
    Stats,
    StillOpen,
    Submit,
    ToAdapterLoader,
    ToFrontend,
    Tokenize,
    Tokenized,
    Tokens,
    ToScheduler,
    Usage,
)

PEERS = ("frontend", "scheduler", "adapter_loader")
WAIT_SECONDS = 30


class Neighbours:
    """The frontend and the scheduler of one run folder, and the workers between them."""

    def __init__(self, run_dir: Path, model_folder: Path, **settings: Any) -> None:
        run_dir.mkdir(mode=0o700)
        self.run_dir = run_dir
        self.frontend: Inbox[Message] = Inbox(run_dir, "frontend", 0, ToFrontend)
        self.scheduler: Inbox[Message] = Inbox(run_dir, "scheduler", 0, ToScheduler)
        self.loader: Inbox[Message] = Inbox(run_dir, "adapter_loader", 0, ToAdapterLoader)
        self._outbox = Outbox(run_dir)
        self._peers = [Outbox(run_dir, Incarnation(peer)) for peer in PEERS]
        self._workers = settings.get("tokenizer_workers", 1)
        self.greet()
        self._arrived: list[Message] = []
        self._log = run_dir.with_name("log")
        chosen = Settings(run_dir=str(run_dir), model_folder=str(model_folder), **settings)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.keep_alive", "tokenizer_workers"],
                env=os.environ | to_environment(chosen),
                stderr=log,
            )

    def greet(self) -> None:
        """Who is not known, is told nothing."""
        for peer in self._peers:
            peer.greet("tokenizer_workers", self._workers)

    def send(self, message: Message, worker: int = 0) -> None:
        self._outbox.send("tokenizer_workers", message, worker)

    def next(self, inbox: Inbox[Message], kind: type[Message]) -> Any:
        """The next message of that kind; others are passed over."""
        deadline = time.monotonic() + WAIT_SECONDS
        over = False
        while not over:
            over = self.process.poll() is not None or time.monotonic() > deadline
            self._arrived += inbox.receive(timeout_ms=100)
            for message in self._arrived:
                if isinstance(message, kind):
                    self._arrived.remove(message)
                    return message
        raise AssertionError(f"no {kind.__name__} has come:\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        """End what is left."""
        self.process.kill()
        self.process.wait()
        for outbox in (self._outbox, *self._peers):
            outbox.close(linger_ms=0)
        self.frontend.close()
        self.scheduler.close()
        self.loader.close()


@pytest.fixture
def start(tmp_path: Path, folder: Path) -> Iterator[Callable[..., Neighbours]]:
    started: list[Neighbours] = []

    def begin(**settings: Any) -> Neighbours:
        started.append(Neighbours(tmp_path / "run", folder, **settings))
        return started[-1]

    yield begin
    for neighbours in started:
        neighbours.close()


def prompt(request_id: int = 1, **given: Any) -> Prompt:
    return Prompt(
        request_id=request_id,
        arrived=time.monotonic(),
        chat=[{"role": "user", "content": "What is the capital of France?"}],
        **given,
    )


def test_a_request_goes_from_prompt_to_end_and_the_worker_leaves_nothing(
    start: Callable[..., Neighbours], tokenizer: Any
) -> None:
    neighbours = start(stats_seconds=0.1)
    ready = neighbours.next(neighbours.frontend, ProcessReady)
    assert ready == ProcessReady("tokenizer_workers", 0, {"max_total_tokens": 8192})

    neighbours.send(prompt(max_tokens=5))
    submit = neighbours.next(neighbours.scheduler, Submit)
    assert (submit.request_id, submit.worker, submit.max_tokens) == (1, 0, 5)
    text = tokenizer.decode(array("i", submit.token_ids).tolist())
    assert "What is the capital of France?" in text

    ids = tokenizer.encode("Paris!").ids
    end = Finished(1, FinishReason.EOS, Usage(prompt_tokens=31, completion_tokens=len(ids)))
    neighbours.send(Tokens([1] * len(ids), ids, {}, finished=(end,)))
    pieces = neighbours.next(neighbours.frontend, Pieces)
    assert [piece.text for piece in pieces.pieces] == ["Paris!"]
    assert pieces.ends == (End(1, FinishReason.EOS, end.usage),)

    stats = neighbours.next(neighbours.frontend, Stats)
    assert "loradex_encode_seconds" in {family[0] for family in stats.families}

    neighbours.send(Shutdown("frontend", 0))
    assert neighbours.next(neighbours.scheduler, Shutdown) == Shutdown("tokenizer_workers", 0)
    assert neighbours.process.wait(WAIT_SECONDS) == 0
    assert not list(neighbours.run_dir.glob("tokenizer_workers*"))


def test_a_question_is_answered_to_the_frontend_that_asks(
    start: Callable[..., Neighbours], tokenizer: Any
) -> None:
    neighbours = start()
    neighbours.send(Tokenize(5, 0, "The capital of France"))
    answer = neighbours.next(neighbours.frontend, Tokenized)
    assert answer.question_id == 5
    encoding = tokenizer.encode("The capital of France")
    assert array("i", answer.token_ids).tolist() == encoding.ids
    assert answer.texts == tuple(encoding.tokens)


def test_a_stop_string_of_a_later_token_is_cancelled_at_the_scheduler(
    start: Callable[..., Neighbours], tokenizer: Any
) -> None:
    neighbours = start()
    neighbours.send(prompt(stop=("Lon",)))
    neighbours.next(neighbours.scheduler, Submit)
    ids = tokenizer.encode("Paris or London").ids
    for token_id in ids:
        neighbours.send(Tokens([1], [token_id], {}))
    assert neighbours.next(neighbours.scheduler, Cancel) == Cancel(1, stopped=True)
    text, ends = "", ()
    while not ends:
        pieces = neighbours.next(neighbours.frontend, Pieces)
        text += "".join(piece.text for piece in pieces.pieces)
        ends = pieces.ends
    assert text == "Paris or "
    assert ends[0].reason == FinishReason.STOP


def test_each_of_several_workers_has_its_own_inbox_and_says_goodbye(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start(tokenizer_workers=2)
    ready = {neighbours.next(neighbours.frontend, ProcessReady).index for _ in range(2)}
    assert ready == {0, 1}
    neighbours.send(prompt(), worker=1)
    assert neighbours.next(neighbours.scheduler, Submit).worker == 1
    for worker in (0, 1):
        neighbours.send(Shutdown("frontend", 0), worker)
    gone = {neighbours.next(neighbours.scheduler, Shutdown).index for _ in range(2)}
    assert gone == {0, 1}
    assert neighbours.process.wait(WAIT_SECONDS) == 0


def test_sigterm_does_not_end_a_worker_before_its_frontend_has_drained(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start()
    neighbours.next(neighbours.frontend, ProcessReady)
    neighbours.process.send_signal(signal.SIGTERM)
    neighbours.send(prompt())
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 1
    neighbours.send(Shutdown("frontend", 0))
    assert neighbours.process.wait(WAIT_SECONDS) == 0


def test_a_setting_that_the_model_cannot_meet_is_one_sentence_and_exit_code_2(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start(max_total_tokens=10**9)
    assert neighbours.process.wait(WAIT_SECONDS) == 2
    assert "loradex: max_total_tokens: 1000000000 is more than" in neighbours.log()


def test_a_template_that_does_not_end_holds_nobody_up(start: Callable[..., Neighbours]) -> None:
    neighbours = start(template_seconds=0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    own = "{{ messages[0].content }} {{ who }}"
    neighbours.send(prompt(1, chat_options=ChatOptions(template=endless)))
    neighbours.send(prompt(2, chat_options=ChatOptions(template=own, variables={"who": "me"})))
    neighbours.send(prompt(3))
    first = neighbours.next(neighbours.scheduler, Submit)
    assert first.request_id == 3
    second = neighbours.next(neighbours.scheduler, Submit)
    assert second.request_id == 2
    pieces = neighbours.next(neighbours.frontend, Pieces)
    (end,) = pieces.ends
    assert (end.request_id, end.failure.status) == (1, 422)
    assert end.failure.message == "the chat template takes more than 0.5 seconds"


def test_a_worker_that_shuts_down_leaves_no_process_of_templates(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start(template_seconds=100)
    endless = "{{ 10 ** (10 ** 10) }}"
    neighbours.send(prompt(1, chat_options=ChatOptions(template="{{ 1 }}")))
    neighbours.next(neighbours.scheduler, Submit)
    (worker,) = children(neighbours.process.pid)
    (child,) = children(worker)
    neighbours.send(prompt(2, chat_options=ChatOptions(template=endless)))
    neighbours.send(prompt(3))
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 3
    neighbours.send(Shutdown("frontend", 0))
    assert neighbours.process.wait(WAIT_SECONDS) == 0
    assert not Path(f"/proc/{child}").exists()


def test_a_worker_that_is_killed_is_replaced_and_what_it_had_can_be_resumed(
    start: Callable[..., Neighbours], tokenizer: Any
) -> None:
    neighbours = start(template_seconds=100)
    neighbours.next(neighbours.frontend, ProcessReady)
    neighbours.send(prompt(1, chat_options=ChatOptions(template="{{ 1 }}")))
    neighbours.next(neighbours.scheduler, Submit)
    neighbours.send(prompt(2))
    first = neighbours.next(neighbours.scheduler, Submit)
    ids = tokenizer.encode("Paris or London").ids
    neighbours.send(Tokens([2, 2], ids[:2], {}))
    heard = neighbours.next(neighbours.frontend, Pieces).pieces
    (worker,) = children(neighbours.process.pid)
    (renderer,) = children(worker)
    endless = "{{ 10 ** (10 ** 10) }}"
    neighbours.send(prompt(3, chat_options=ChatOptions(template=endless)))
    neighbours.send(prompt(4))
    neighbours.next(neighbours.scheduler, Submit)

    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: children(neighbours.process.pid) not in ([], [worker]))
    neighbours.greet()
    neighbours.next(neighbours.frontend, ProcessReady)
    wait_until(lambda: not Path(f"/proc/{renderer}").exists())
    neighbours.send(StillOpen(0, 0, [2]))
    neighbours.send(prompt(2, heard=(heard[-1].produced,)))
    assert neighbours.next(neighbours.scheduler, StillOpen) == StillOpen(0, 0, [2])
    again = neighbours.next(neighbours.scheduler, Submit)
    assert (again.token_ids, again.heard) == (first.token_ids, (2,))
    end = Finished(2, FinishReason.EOS, Usage(prompt_tokens=31, completion_tokens=len(ids)))
    neighbours.send(Resumed(2, array("i", ids).tobytes(), [], [], 0.0, end))
    pieces = neighbours.next(neighbours.frontend, Pieces)
    text = "".join(piece.text for piece in [*heard, *pieces.pieces])
    assert text == "Paris or London"
    assert [one.request_id for one in pieces.ends] == [2]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline


def texts(asked: AskTexts, files: dict[str, bytes], tokenizer: str = "") -> AdapterTexts:
    return AdapterTexts(asked.question_id, asked.adapter, "1", files, tokenizer)


def test_a_chat_is_rendered_with_the_template_that_its_adapter_ships(
    start: Callable[..., Neighbours], tokenizer: Any
) -> None:
    neighbours = start()
    adapter = AdapterKey("hub", "x", scope="mine")
    neighbours.send(prompt(1, adapter=adapter, adapter_token="secret"))
    neighbours.send(prompt(2))
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 2
    asked = neighbours.next(neighbours.loader, AskTexts)
    assert (asked.adapter, asked.adapter_token, asked.worker) == (adapter, "secret", 0)
    config = {
        "chat_template": "{{ bos_token }}{{ pad_token }}{{ messages[0].content }}",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    files = {"tokenizer_config.json": msgspec.json.encode(config)}
    neighbours.send(texts(asked, files, asked.known_tokenizers[0]))
    submit = neighbours.next(neighbours.scheduler, Submit)
    expected = "<|im_start|><|endoftext|>What is the capital of France?"
    assert tokenizer.decode(array("i", submit.token_ids), skip_special_tokens=False) == expected
    assert submit.stop_token_ids == ()  # it ends the base model's replies too
    assert "secret" not in neighbours.log()


def test_a_tokenizer_is_compared_beside_the_prompts_of_others(
    start: Callable[..., Neighbours], folder: Path
) -> None:
    neighbours = start()
    file = msgspec.json.decode((folder / "tokenizer.json").read_bytes())
    file["model"]["vocab"]["<pad>"] = 49152
    neighbours.send(prompt(1, adapter=AdapterKey("local", "same")))
    neighbours.send(prompt(2, adapter=AdapterKey("local", "other")))
    same, other = (neighbours.next(neighbours.loader, AskTexts) for _ in range(2))
    pretty = msgspec.json.format((folder / "tokenizer.json").read_bytes(), indent=4)
    neighbours.send(texts(same, {"tokenizer.json": pretty}, "same"))
    neighbours.send(texts(other, {"tokenizer.json": msgspec.json.encode(file)}, "other"))
    neighbours.send(prompt(3))
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 3
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 1
    (end,) = neighbours.next(neighbours.frontend, Pieces).ends
    assert (end.request_id, end.failure.status) == (2, 422)
    assert end.failure.message.startswith(
        "adapter other: its tokenizer.json disagrees: it has the token '<pad>' (id 49152), and"
    )


def test_where_adapters_templates_are_off_the_loader_is_not_asked(
    start: Callable[..., Neighbours],
) -> None:
    neighbours = start(adapter_chat_templates=False)
    neighbours.send(prompt(1, adapter=AdapterKey("local", "x")))
    assert neighbours.next(neighbours.scheduler, Submit).request_id == 1
    assert neighbours.loader.receive(timeout_ms=0) == []


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]
