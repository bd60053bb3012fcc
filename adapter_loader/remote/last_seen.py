"""What names meant when they were last asked about, for the time when nobody can be asked.

A file for each name, below a folder that several servers may share; of too many, those that were
written first go. Losing one costs no more than a question, so a disk that fails is not an error.
"""

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

MOST = 10_000
MAX_BYTES = 256

log = logging.getLogger(__name__)


class LastSeen:
    """most  how many names are kept, about"""

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self._folder = folder
        self._most = most

    def get(self, name: str) -> str | None:
        try:
            with self._path(name).open("rb") as file:
                return file.read(MAX_BYTES).decode("ascii")
        except (OSError, UnicodeDecodeError):
            return None

    def put(self, name: str, meaning: str) -> None:
        """meaning is ASCII of at most MAX_BYTES."""
        if self.get(name) == meaning:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, written = tempfile.mkstemp(dir=self._folder, prefix=".")
            with os.fdopen(descriptor, "wb") as file:
                file.write(meaning.encode("ascii"))
            Path(written).rename(self._path(name))
            self._shrink()
        except OSError as error:
            log.warning("event=last_seen_not_written reason=%a", error.strerror)

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()

    def _shrink(self) -> None:
        kept = list(self._folder.iterdir())
        if len(kept) <= self._most:
            return
        ages: list[tuple[float, Path]] = []
        for path in kept:
            with suppress(FileNotFoundError):  # another process shrinks as well
                ages.append((path.stat().st_mtime, path))
        for _, path in sorted(ages)[: len(kept) - self._most * 9 // 10]:
            path.unlink(missing_ok=True)
