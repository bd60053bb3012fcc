"""One `key=value` line per event, on stderr. No prompt, no token text, no secret is ever logged.

Libraries may log at their lower levels what they send: headers, and URLs that are signed. So the
level of the settings is that of our own packages, and nothing below a warning comes from others.
"""

import logging
import sys
import time

from pipeline.channels import PROCESSES

OURS = (*PROCESSES, "pipeline", "__main__")  # how our loggers' names begin


class _Formatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = (
            f"{moment}.{int(record.msecs):03d}Z level={record.levelname.lower()} "
            f"process={self._process} {record.getMessage()}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logs(process: str, level: str) -> None:
    """Log to stderr from now on, ours at `level` and above, others' warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(process))
    lowest = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(lowest, logging.WARNING), handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(lowest)
