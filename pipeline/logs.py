"""One line per event on stderr, `key=value` or JSON. No prompt, token text or secret is logged.

Libraries may log at their lower levels what they send: headers, and URLs that are signed. So the
level of the settings is that of our own packages, and nothing below a warning comes from others.
"""

import ast
import json
import logging
import re
import sys
import time

from pipeline.channels import PROCESSES

OURS = (*PROCESSES, "pipeline", "__main__")  # how our loggers' names begin


# `key=value` at the start of a message; a value with spaces is quoted, as %a does it
_FIELD = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s'"]\S*)(?:\s+|$)""")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


class _Formatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{_moment(record)} level={record.levelname.lower()} "
            f"process={self._process} {record.getMessage()}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(_Formatter):
    """An object a line: what a message has in fields, and `message` for the rest of it."""

    def format(self, record: logging.LogRecord) -> str:
        fields, rest = _fields(record.getMessage())
        line = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "process": self._process,
            **fields,
        }
        if rest:
            line["message"] = rest
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _moment(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _fields(message: str) -> tuple[dict[str, str | int | float], str]:
    """The `key=value` that a message begins with, and what follows them."""
    fields: dict[str, str | int | float] = {}
    at = 0
    while (field := _FIELD.match(message, at)) is not None:
        fields[field[1]] = _value(field[2])
        at = field.end()
    return fields, message[at:]


def _value(text: str) -> str | int | float:
    if text[0] in "'\"":
        return str(ast.literal_eval(text))
    if (number := _NUMBER.fullmatch(text)) is None:
        return text
    return float(text) if number[2] else int(text)


def set_up_logs(process: str, level: str, form: str = "text") -> None:
    """Log to stderr from now on, ours at `level` and above, others' warnings and errors.

    form  text or json
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((_JsonFormatter if form == "json" else _Formatter)(process))
    lowest = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(lowest, logging.WARNING), handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(lowest)
