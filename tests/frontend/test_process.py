"""`python -m frontend`, over its real sockets: it says when it is ready, drains, and ends."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from frontend.__main__ import ready_line
from pipeline.channels import Inbox, Outbox
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    Cancel,
    Message,
    Pieces,
    ProcessReady,
    Prompt,
    Shutdown,
    Stats,
    ToTokenizerWorker,
)
from pipeline.metrics import snapshot
from pipeline.process import EXIT_CONFIG
from tests.frontend.fakes import OTHERS, end, events, make_adapter, piece, settings

M = TypeVar("M", bound=Message)


class Frontend:
    """The process, and this test as the tokenizer worker behind it."""

    def __init__(self, **given: Any) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="loradex-"))  # short: sockets lie in it
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {"RUN_DIR": self.run_dir, "PORT": self.port, "LOG_LEVEL": "warning", **given}
        self._inbox: Inbox[ToTokenizerWorker] = Inbox(
            self.run_dir, "tokenizer_workers", 0, ToTokenizerWorker
        )
        self._outbox = Outbox(self.run_dir)
        self._worker = Outbox(self.run_dir, Incarnation("tokenizer_workers"))
        self._worker.greet("frontend", given.get("FRONTENDS", 1))  # else it is told nothing
        self._received: list[ToTokenizerWorker] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.keep_alive", "frontend"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as honcho does, which sends signals to all of it
            env={**os.environ, **{f"LORADEX_{k}": str(v) for k, v in environment.items()}},
        )

    def send(self, message: Message, index: int = 0) -> None:
        self._outbox.send("frontend", message, index)

    def wait_until_ready(self) -> str:
        """The line that says so."""
        for process in OTHERS:
            self.send(ProcessReady(process))
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def next(self, kind: type[M]) -> M:
        """The next message, which is of this kind."""
        while not self._received:
            self._received += self._inbox.receive(timeout_ms=20_000)
        message = self._received.pop(0)
        assert isinstance(message, kind)
        return message

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)

    def exit_code(self) -> int:
        """Waits; what it printed after the ready line must be nothing."""
        assert self._process.stdout is not None
        with self._process.stdout as rest:
            assert rest.read() == ""
        return self._process.wait(20)

    def clean_up(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self.exit_code()
        for outbox in (self._outbox, self._worker):
            outbox.close(0)
        self._inbox.close()
        shutil.rmtree(self.run_dir)


@pytest.fixture
def frontend(request: pytest.FixtureRequest) -> Iterator[Frontend]:
    running = Frontend(**getattr(request, "param", {}))
    yield running
    running.clean_up()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BODY = {"model": "", "prompt": "Hi", "stream": True}


def ask(frontend: Frontend, threads: ThreadPoolExecutor) -> "Future[httpx.Response]":
    url = frontend.url + "/v1/completions"
    return threads.submit(lambda: httpx.post(url, json=BODY, timeout=20))


def test_sigterm_lets_streams_end_refuses_new_ones_and_leaves_nothing(
    frontend: Frontend, threads: ThreadPoolExecutor
) -> None:
    frontend.wait_until_ready()
    running = ask(frontend, threads)
    prompt = frontend.next(Prompt)
    frontend.send(Pieces([piece("Hel", prompt.request_id)]))
    frontend.stop()
    while httpx.get(frontend.url + "/health").status_code == 200:
        pass  # until the signal has been heard
    refused = httpx.post(frontend.url + "/v1/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    frontend.send(Pieces([piece("lo", prompt.request_id)], (end(prompt.request_id),)))
    texts = [event["choices"][0]["text"] for event in events(running.result().text)[:-1]]
    assert "".join(texts) == "Hello"
    assert frontend.next(Shutdown) == Shutdown("frontend", 0)
    assert frontend.exit_code() == 0
    assert [path.name for path in frontend.run_dir.iterdir()] == ["tokenizer_workers.0.sock"]


@pytest.mark.parametrize("frontend", [{"DRAIN_SECONDS": 0}], indirect=True)
def test_streams_that_outlast_the_drain_are_cut_off_and_cancelled(
    frontend: Frontend, threads: ThreadPoolExecutor
) -> None:
    frontend.wait_until_ready()
    running = ask(frontend, threads)
    prompt = frontend.next(Prompt)
    frontend.stop()
    assert running.result().status_code == 503
    assert running.result().json()["error"]["code"] == "shutting_down"
    assert frontend.next(Cancel) == Cancel(prompt.request_id)
    assert frontend.next(Shutdown) == Shutdown("frontend", 0)
    assert frontend.exit_code() == 0


def test_it_listens_before_it_is_ready_and_says_so_once_it_is(frontend: Frontend) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(retries=20), base_url=frontend.url) as client:
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=BODY).status_code == 503
        line = frontend.wait_until_ready()
        assert f"ready at {frontend.url} " in line
        assert client.get("/health").status_code == 200
        frontend.send(ProcessReady("gpu_worker"))  # started again; nothing is printed twice
        registry = CollectorRegistry()
        Counter("loradex_steps", "Steps", registry=registry)
        frontend.send(Stats("scheduler", 0, snapshot(registry)))
        while "loradex_steps_total" not in client.get("/metrics").text:
            pass  # until the message has arrived
    frontend.stop()
    assert frontend.exit_code() == 0


def test_a_port_in_use_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        frontend = Frontend(PORT=port)
        assert frontend.exit_code() == EXIT_CONFIG
        frontend.clean_up()
    assert capfd.readouterr().err.splitlines() == [
        f"loradex: port: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


@pytest.mark.parametrize("frontend", [{"FRONTENDS": 2}], indirect=True)
def test_two_frontends_share_a_port_and_show_each_others_metrics(frontend: Frontend) -> None:
    for process in OTHERS:
        frontend.send(ProcessReady(process), index=1)
    frontend.wait_until_ready()
    seen: set[str] = set()
    while len(seen) < 2:
        text = httpx.get(frontend.url + "/metrics").text
        seen |= set(re.findall(r'loradex_requests_in_flight{index="(\d)"', text))
    frontend.stop()
    assert {frontend.next(Shutdown).index, frontend.next(Shutdown).index} == {0, 1}
    assert frontend.exit_code() == 0


def test_the_line_shows_the_sample_adapter_where_there_is_one(tmp_path: Path) -> None:
    make_adapter(tmp_path, "pirate")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        shown = ready_line(settings(host="0.0.0.0"), listener)
        assert url in shown
        assert '"model": "some/base"' in shown
        assert '"model": "pirate"' in ready_line(settings(adapter_root=(str(tmp_path),)), listener)
