"""Logs are lines of key=value on stderr."""

import json
import re
import subprocess
import sys
from typing import Any

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


def objects(code: str) -> list[Any]:
    return [json.loads(line) for line in logged(code).splitlines()]


def test_a_line_of_json_has_the_fields_with_their_types() -> None:
    code = r"""
set_up_logs('scheduler', 'info', 'json')
log.info('event=x blocks=%d seconds=%.1f name=%a kind=%s', 7, 0.5, 'it\'s "7" é\n', 'a-b')
"""
    (line,) = objects(code)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "process": "scheduler",
        "event": "x",
        "blocks": 7,
        "seconds": 0.5,
        "name": 'it\'s "7" é\n',
        "kind": "a-b",
    }


def test_what_is_no_field_is_the_message_and_an_exception_is_on_its_line() -> None:
    code = r"""
set_up_logs('a', 'info', 'json')
logging.getLogger('library').warning("slow: it's %s", 'late')
log.warning('event=refused reason=Expected `int`, got `str`')
try:
    1 / 0
except ZeroDivisionError:
    log.exception('event=broken adapter=%a', '007')
"""
    library, refused, broken = objects(code)
    assert library["message"] == "slow: it's late"
    assert "event" not in library
    assert (refused["event"], refused["reason"]) == ("refused", "Expected")
    assert refused["message"] == "`int`, got `str`"
    assert broken["adapter"] == "007"
    assert broken["exception"].endswith("ZeroDivisionError: division by zero")
