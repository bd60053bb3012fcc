"""Downloaded files for tokenizers on disk: one file for each adapter's, the least recently used go.

Several servers may share the folder. What is lost is downloaded again, so a disk that fails is not
an error.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

MAX_BYTES = 1 << 30
MOST = 20_000

log = logging.getLogger(__name__)


class TextCache:
    """max_bytes and most bound what is kept, about."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, most: int = MOST) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._most = most
        self._decoder = msgspec.msgpack.Decoder(dict[str, bytes])

    def get(self, entry: str) -> dict[str, bytes] | None:
        path = self._folder / entry
        try:
            files = self._decoder.decode(path.read_bytes())
            os.utime(path)  # it was used
        except (OSError, msgspec.DecodeError):
            return None
        return files

    def put(self, entry: str, files: Mapping[str, bytes]) -> None:
        """entry is a digest."""
        try:
            with self.scratch() as scratch:
                written = scratch / entry
                written.write_bytes(msgspec.msgpack.encode(files))
                written.rename(self._folder / entry)
            self._shrink()
        except OSError as error:
            log.warning("event=texts_not_kept reason=%a", error.strerror)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is being downloaded, which does not outlive this. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self._folder) as name:
            yield Path(name)

    def _shrink(self) -> None:
        """The oldest of too many, or of too much, go."""
        kept: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process shrinks as well
                status = path.stat()
                if not path.name.startswith("."):
                    kept.append((status.st_mtime, status.st_size, path))
        count, nbytes = len(kept), sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if count <= self._most and nbytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            count, nbytes = count - 1, nbytes - size
