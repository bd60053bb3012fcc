"""Progress on stderr: a bar for a person at a terminal, a line every 10% for a log."""

import io
import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]


class PlainLines(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
    """A tqdm that writes one line per tenth done, for a stderr that is a file or a pipe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tenths_said = -1
        self._lines_to = kwargs.pop("file", None) or sys.stderr
        kwargs["file"] = io.StringIO()  # where tqdm's own control characters go
        super().__init__(*args, **kwargs)

    def display(self, *_args: Any, **_kwargs: Any) -> None:
        """Called by tqdm at most every `mininterval` seconds, and at the end."""
        if not self.total:
            return
        tenths = int(10 * self.n / self.total)
        if tenths > self._tenths_said:
            self._tenths_said = tenths
            label = (self.desc or "progress").removesuffix(": ")
            print(f"{label}: {min(tenths, 10) * 10}%", file=self._lines_to, flush=True)


def progress_class() -> type[Any]:
    """`tqdm` or its plain double, whichever suits stderr as it is now."""
    return tqdm if sys.stderr.isatty() else PlainLines


def progress(description: str, total: int, unit: str) -> Any:
    """An open progress display: a context manager with `update(done_since_last_call)`."""
    return progress_class()(desc=description, total=total, unit=unit, unit_scale=unit == "B")
