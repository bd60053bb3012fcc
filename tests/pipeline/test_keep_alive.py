"""Processes that die, hang or end, and what the keep-alive makes of it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.incarnation import BEATS, VARIABLE, Incarnation, told
from pipeline.keep_alive import LONGEST_BACKOFF_SECONDS, Deaths

CHILD = """
import os, signal, sys, time
from pipeline.incarnation import Incarnation
me = Incarnation.of_environment("scheduler", hang_seconds={hang})
def out(*words): os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
def live():
    while True:
        me.beat()
        time.sleep(0.01)
{body}
"""
PARENT = """
import sys
from pipeline.config import load_settings
from pipeline.keep_alive import keep_alive
from pipeline.logs import set_up_logs
set_up_logs({process!r}, "info")
sys.exit(keep_alive({process!r}, [sys.executable, "-c", {child!r}], load_settings()))
"""


class Keeper:
    """A keep-alive, and what it and its children print."""

    def __init__(self, body: str, process: str, variables: dict[str, str]) -> None:
        child = CHILD.format(body=body, hang=variables.get("LORADEX_HANG_SECONDS", "30"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(process=process, child=child)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"LORADEX_RESTART_BACKOFF_SECONDS": "0.01"} | variables,
        )
        self.seen: list[str] = []
        self._timer = threading.Timer(30, self.process.kill)  # a test that waits for ever, fails
        self._timer.start()

    def line(self, pattern: str) -> "re.Match[str]":
        """The next line that has it; those before it are passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern} in {''.join(self.seen)}")

    def pid(self) -> int:
        return int(self.line(r"event=started index=\d pid=(\d+)")[1])

    def end(self) -> int:
        """The status, once it has ended, and with it all that it has started."""
        assert self.process.stdout is not None
        self.seen += self.process.stdout  # until nobody has it open
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self._timer.cancel()
        self.end()
        assert self.process.stdout is not None
        self.process.stdout.close()


Keep = Callable[..., Keeper]


@pytest.fixture
def keep() -> Iterator[Keep]:
    started: list[Keeper] = []

    def start(body: str, process: str = "scheduler", **settings: object) -> Keeper:
        variables = {f"LORADEX_{name.upper()}": str(value) for name, value in settings.items()}
        started.append(Keeper(body, process, variables))
        return started[-1]

    yield start
    for keeper in started:
        keeper.close()


def test_one_that_ends_well_is_not_started_again(keep: Keep) -> None:
    keeper = keep("out('once')")
    assert keeper.end() == 0
    assert keeper.seen.count("once\n") == 1


def test_one_that_is_killed_is_started_again_and_told_so(keep: Keep) -> None:
    keeper = keep("out('restarts', me.restarts, me.number)\nlive()")
    first = keeper.pid()
    number = int(keeper.line(r"restarts 0 (\d+)")[1])
    os.kill(first, signal.SIGKILL)
    keeper.line(r"event=died index=0 pid=\d+ cause='signal 9 \(Killed\)' starts_again_in=0")
    assert keeper.pid() != first
    assert int(keeper.line(r"restarts 1 (\d+)")[1]) > number


def test_one_that_exits_with_an_error_is_started_again(keep: Keep) -> None:
    keeper = keep("sys.exit(0 if me.restarts == 2 else 7)")
    assert keeper.end() == 0
    assert sum("cause='exit 7'" in line for line in keeper.seen) == 2


def test_each_of_several_is_started_for_itself(keep: Keep) -> None:
    body = "out('index', me.index, 'restarts', me.restarts)\nlive()"
    keeper = keep(body, "tokenizer_workers", tokenizer_workers=2)
    keeper.pid()
    second = keeper.pid()
    os.kill(second, signal.SIGKILL)
    keeper.line("index 1 restarts 1")
    assert not any("index 0 restarts 1" in line for line in keeper.seen)


def test_it_ends_when_the_last_of_several_has_ended_well(keep: Keep) -> None:
    keeper = keep("out('index', me.index)", "frontend", frontends=3)
    assert keeper.end() == 0
    assert sorted(line for line in keeper.seen if line.startswith("index")) == [
        f"index {index}\n" for index in range(3)
    ]


def test_one_that_has_stopped_is_noticed_and_killed(keep: Keep) -> None:
    keeper = keep("me.beat()\nout('ready', me.restarts)\nlive()", hang_seconds=0.5)
    pid = keeper.pid()
    keeper.line("ready 0")
    os.kill(pid, signal.SIGSTOP)
    keeper.line("cause='no sign of life for 0.5 s'")
    keeper.line("ready 1")


def test_a_start_may_take_longer_than_a_sign_of_life(keep: Keep) -> None:
    keeper = keep("time.sleep(1)\nout('restarts', me.restarts)", hang_seconds=0.2)
    assert keeper.end() == 0
    assert "restarts 0\n" in keeper.seen


def test_too_many_deaths_end_it_with_an_error(keep: Keep) -> None:
    keeper = keep("sys.exit(7)", restart_limit=3)
    assert keeper.end() == 7
    assert sum("event=started" in line for line in keeper.seen) == 4
    assert "given_up=true" in keeper.seen[-1]


def test_an_error_of_the_operator_ends_it(keep: Keep) -> None:
    keeper = keep("sys.exit(2)")
    assert keeper.end() == 2
    assert sum("event=started" in line for line in keeper.seen) == 1


def test_the_same_error_after_a_good_start_is_tried_again(keep: Keep) -> None:
    keeper = keep("me.beat()\nsys.exit((9, 2, 0)[me.restarts])")
    assert keeper.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_the_end_is_waited_for(
    keep: Keep, number: signal.Signals
) -> None:
    keeper = keep(
        f"def stop(*_):\n    out('told')\n    sys.exit(0)\n"
        f"signal.signal({int(number)}, stop)\nout('ready')\nlive()"
    )
    keeper.line("ready")
    keeper.process.send_signal(number)
    keeper.line("told")
    assert keeper.end() == 0


def test_one_that_dies_while_it_drains_is_started_and_told_to_drain(keep: Keep) -> None:
    body = (
        "def stop(*_):\n"
        "    out('drains', me.restarts)\n"
        "    if me.restarts:\n"
        "        sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "out('ready')\n"
        "live()"
    )
    keeper = keep(body)
    pid = keeper.pid()
    keeper.line("ready")
    keeper.process.terminate()
    keeper.line("drains 0")
    os.kill(pid, signal.SIGKILL)
    keeper.line("drains 1")
    assert keeper.end() == 0


def test_one_that_is_stopped_before_it_can_listen_has_ended_well(keep: Keep) -> None:
    keeper = keep("out('starting')\nsignal.pause()")
    keeper.line("starting")
    keeper.process.terminate()
    assert keeper.end() == 0


def test_one_that_has_stopped_when_it_is_told_to_has_ended_well(keep: Keep) -> None:
    """At its end an interpreter has no handlers any more."""
    keeper = keep("me.beat()\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\nout('ends')\nlive()")
    keeper.line("ends")
    keeper.process.terminate()
    assert keeper.end() == 0
    assert "event=died" not in "".join(keeper.seen)


def test_its_processes_die_with_it(keep: Keep) -> None:
    keeper = keep("out('ready')\nlive()", "frontend", frontends=2)
    for _ in range(2):
        keeper.line("ready")
    keeper.process.kill()
    assert keeper.end() == -9  # and nobody else has its stdout open, else this would not return


def test_a_process_that_does_not_exist_is_refused() -> None:
    command = [sys.executable, "-m", "pipeline.keep_alive", "backend"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "invalid choice" in ended.stderr


def test_it_waits_ever_longer_within_the_window() -> None:
    deaths = Deaths(limit=9, window_seconds=100, backoff_seconds=1)
    waits = [deaths.add(0.0) for _ in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert LONGEST_BACKOFF_SECONDS == 30
    assert deaths.add(50.0) is None


def test_deaths_of_long_ago_do_not_count() -> None:
    deaths = Deaths(limit=2, window_seconds=100, backoff_seconds=1)
    assert [deaths.add(now) for now in (0.0, 50.0, 120.0, 160.0)] == [0, 1, 1, 1]
    assert deaths.add(170.0) is None


def test_signs_of_life_are_few(tmp_path: Path) -> None:
    reads, writes = os.pipe2(os.O_NONBLOCK)
    now = 0.0
    incarnation = Incarnation("scheduler", descriptor=writes, hang_seconds=8, clock=lambda: now)
    for turn in range(1000):
        now = turn / 100
        incarnation.beat()
    assert len(os.read(reads, 4096)) == 10 * BEATS / 8
    os.close(reads)
    incarnation.beat()
    now += 1
    incarnation.beat()  # nobody reads any more
    os.close(writes)


def test_one_that_is_started_by_hand_gives_no_signs_of_life() -> None:
    incarnation = Incarnation.of_environment("scheduler", hang_seconds=1, environment={})
    incarnation.beat()
    assert (incarnation.index, incarnation.restarts) == (0, 0)
    assert incarnation.number > 0
    assert incarnation.beat_seconds == float("inf")


def test_what_is_told_is_understood() -> None:
    reads, writes = os.pipe()
    environment = told(index=1, number=5, restarts=2, descriptor=writes)
    assert list(environment) == [VARIABLE]
    incarnation = Incarnation.of_environment("frontend", hang_seconds=8, environment=environment)
    assert (incarnation.index, incarnation.number, incarnation.restarts) == (1, 5, 2)
    incarnation.beat()
    assert os.read(reads, 10) == b"."
    os.close(reads)
    os.close(writes)
