"""Logs are lines of key=value on stderr."""

import re
import subprocess
import sys

PRELUDE = """
import logging
from pipeline.logs import set_up_logs
log = logging.getLogger('scheduler.x')
"""


def logged(code: str) -> str:
    """What a process that runs this writes to stderr; nothing goes to stdout."""
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    return ended.stderr


def test_a_line_has_its_time_level_process_and_event() -> None:
    line = logged("set_up_logs('scheduler', 'info'); log.info('event=ready blocks=%d', 7)")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=info process=scheduler "
        r"event=ready blocks=7\n",
        line,
    )


def test_what_is_below_the_level_is_left_out() -> None:
    assert logged("set_up_logs('scheduler', 'warning'); log.info('event=ready')") == ""


def test_the_second_set_up_takes_the_place_of_the_first() -> None:
    lines = logged("set_up_logs('a', 'info'); set_up_logs('a.1', 'info'); log.info('event=x')")
    assert lines.count("\n") == 1
    assert "process=a.1" in lines


def test_our_own_packages_are_heard_at_the_level_that_is_asked_for() -> None:
    for name in ("frontend.generate", "pipeline.process", "__main__"):
        code = f"set_up_logs('a', 'debug'); logging.getLogger('{name}')"
        assert "level=debug" in logged(code + ".debug('event=x')")


def test_libraries_are_heard_only_when_something_is_wrong() -> None:
    code = "set_up_logs('a', 'debug'); logging.getLogger('any.library')"
    assert logged(code + ".info('Authorization: Bearer')") == ""
    assert "level=warning" in logged(code + ".warning('event=slow')")


def test_an_exception_follows_its_line() -> None:
    lines = logged(
        "set_up_logs('a', 'info')\ntry:\n    1 / 0\n"
        "except ZeroDivisionError:\n    log.exception('event=broken')"
    )
    assert "level=error process=a event=broken\nTraceback" in lines
    assert lines.endswith("ZeroDivisionError: division by zero\n")
