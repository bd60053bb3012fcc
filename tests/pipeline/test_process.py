"""The life of a process: settings, logs, numbering, signals, and its exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.process import EXIT_CONFIG, EXIT_DEADLINE, run_folder

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PRELUDE = """
import logging, os, signal, sys
from pathlib import Path
from pipeline.errors import ConfigError
from pipeline.process import run
def out(*words): os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
def main(settings, incarnation):
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a process whose main has this body."""

    def execute(
        body: str, process: str = "scheduler", pass_fds: tuple[int, ...] = (), **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        return subprocess.run(
            [sys.executable, "-c", f"{PRELUDE}{indented}run({process!r}, main)"],
            pass_fds=pass_fds,
            env={**os.environ, "LORADEX_RUN_DIR": str(tmp_path / "run"), **variables},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return execute


def test_a_process_has_its_settings_its_run_folder_and_ends_well(run: Run, tmp_path: Path) -> None:
    ended = run("out(settings.port, incarnation.index)", LORADEX_PORT="81")
    assert (ended.returncode, ended.stdout) == (0, "81 0\n")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert ended.stderr.endswith("level=info process=scheduler event=stopped\n")


@pytest.mark.parametrize(
    ("body", "variables", "expected"),
    [
        ("raise ConfigError('model_id: no')", {}, "loradex: model_id: no\n"),
        (
            "pass",
            {"LORADEX_PORT": "x"},
            "loradex: port: Expected `int`, got `str`\n",
        ),
        (
            "pass",
            {"LORADEX_POTR": "1"},
            "loradex: LORADEX_POTR: there is no setting `potr`\n",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_its_own_exit_code(
    run: Run, body: str, variables: dict[str, str], expected: str
) -> None:
    ended = run(body, **variables)
    assert (ended.returncode, ended.stderr) == (EXIT_CONFIG, expected)


def test_any_other_exception_ends_the_process_with_its_traceback(run: Run) -> None:
    ended = run("raise LookupError('ours')")
    assert ended.returncode == 1
    assert ended.stderr.endswith("LookupError: ours\n")


def test_sigterm_sets_the_deadline_and_no_more(run: Run) -> None:
    ended = run(
        "os.kill(os.getpid(), signal.SIGTERM)\nout(round(signal.getitimer(signal.ITIMER_REAL)[0]))",
        LORADEX_DRAIN_SECONDS="100",
    )
    assert (ended.returncode, ended.stdout) == (0, "105\n")


def test_a_process_exits_at_the_deadline_whatever_it_does(run: Run) -> None:
    ended = run(
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)  # as if the deadline were near\n"
        "while True:\n"
        "    signal.pause()"
    )
    assert ended.returncode == EXIT_DEADLINE
    assert "event=deadline_passed" in ended.stderr


def test_an_interrupt_of_the_terminal_is_left_to_the_supervisor(run: Run) -> None:
    ended = run("os.kill(os.getpid(), signal.SIGINT)\nout('still here')")
    assert (ended.returncode, ended.stdout) == (0, "still here\n")


def test_one_of_several_is_numbered_as_the_keep_alive_says(run: Run) -> None:
    body = "out(incarnation.index, incarnation.number, incarnation.restarts)"
    reads, writes = os.pipe()
    told = {"LORADEX_INCARNATION": f"1 77 3 {writes}", "LORADEX_TOKENIZER_WORKERS": "2"}
    ended = run(body, process="tokenizer_workers", pass_fds=(writes,), **told)
    os.close(reads)
    os.close(writes)
    assert (ended.returncode, ended.stdout) == (0, "1 77 3\n")
    assert "process=tokenizer_workers.1 event=stopped" in ended.stderr


def test_a_run_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match=r"is not a folder of this user alone \(mode 0700\)"):
        run_folder(Settings(run_dir=str(folder)))


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: cannot use .*: Not a directory"):
        run_folder(Settings(run_dir=str(tmp_path / "file" / "run")))


def test_a_run_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is too long a path for sockets \(80 bytes"):
        run_folder(Settings(run_dir=str(tmp_path / ("x" * 80))))
