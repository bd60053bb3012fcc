"""Downloaded adapters on disk: a folder each, up to a total size, the least recently used go first.

    FOLDER/entries/DIGEST/   complete: its files never change
    FOLDER/partial/DIGEST/   being downloaded, or left by a download that was cut off

Nothing is kept in memory but what is being written: several servers may share the folder. Locks
(flock) say what must stay, and end with whoever holds them: a shared one on the weights of an
entry that is being read, an exclusive one on the folder of a download.

The time of an entry's folder is that of its last use. That of its files stays, since it is part of
their identity.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Counter, Gauge

from adapter_loader.refusals import invalid, unavailable
from adapter_loader.remote.retries import Interrupted
from adapter_loader.sources import WEIGHTS_FILE, AdapterFiles, open_files
from pipeline.adapter_roots import CONFIG_FILE
from pipeline.errors import RequestError
from pipeline.metrics import REGISTRY

REMOVED = "removed-"  # how the names of folders begin that are on their way out

USED_BYTES = Gauge(
    "loradex_disk_cache_used_bytes",
    "Bytes of the disk cache that were taken, with what is being downloaded, when it last changed",
    registry=REGISTRY,
)
ENTRIES = Gauge(
    "loradex_disk_cache_adapters",
    "Adapters that lay whole in the disk cache when it last changed",
    registry=REGISTRY,
)
EVICTIONS = Counter(
    "loradex_disk_cache_evictions",
    "Folders of the disk cache that went to make room",
    registry=REGISTRY,
)


class _Kept(NamedTuple):
    """A folder of the cache, and what its lock is on."""

    last_used: float
    nbytes: int
    folder: Path
    locked: Path


class DiskCache:
    """max_bytes bounds what is kept and what is being downloaded, together."""

    def __init__(self, *, folder: Path, max_bytes: int) -> None:
        self._entries = folder / "entries"
        self._partial = folder / "partial"
        self._max_bytes = max_bytes
        self._room = threading.Lock()  # held while room is looked for
        self._reserved: dict[Path, int] = {}  # folder that is being filled -> bytes when it is
        self._reclaim()
        self._measure()

    def folder_of(self, digest: str) -> Path:
        """Where a complete entry lies, while its files are open."""
        return self._entries / digest

    def open(self, digest: str, max_adapter_bytes: int) -> AdapterFiles | None:
        """The files of a complete entry, which stays until they are closed; None without one.

        Raises RequestError, or Interrupted when it went away in this moment.
        """
        entry = self._entries / digest
        if not entry.is_dir():
            return None
        try:
            files = open_files(entry, max_adapter_bytes)
        except (FileNotFoundError, RequestError) as error:
            whole = all((entry / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))
            if whole and isinstance(error, RequestError):
                raise
            if not whole:  # it is being evicted, or somebody removed a part of it by hand
                shutil.rmtree(entry, ignore_errors=True)
            raise Interrupted("it went away from the disk cache while it was opened") from error
        try:
            fcntl.flock(files.weights, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(entry)
        except OSError as error:  # it is being evicted
            files.close()
            raise Interrupted("it went away from the disk cache while it was opened") from error
        return files

    @contextmanager
    def filling(self, digest: str) -> Iterator[Path]:
        """The folder to download an entry's files into; it may hold what an earlier try has left.

        Whoever else fills the same entry at the same time gets a folder of its own, which does not
        outlive the attempt. Raises RequestError when the disk does not let it be made.
        """
        try:
            self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._entries.mkdir(mode=0o700, exist_ok=True)
            folder = self._partial / digest
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = _lock(folder)
            private = lock is None
            if lock is None:
                folder = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=self._partial))
                lock = _lock(folder)
                assert lock is not None, "nobody else knows the folder"
        except OSError as error:
            raise unavailable(f"it could not be stored ({error.strerror})") from error
        try:
            yield folder
        except OSError as error:
            raise unavailable(f"it could not be stored ({error.strerror})") from error
        finally:
            with self._room:
                self._reserved.pop(folder, None)
            if private:
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            self._measure()

    def reserve(self, folder: Path, nbytes: int) -> None:
        """Make room for what `folder` will hold in all. Raises RequestError when there is none."""
        if nbytes > self._max_bytes:
            raise invalid(
                f"it takes {nbytes} bytes, more than the whole disk cache (disk_cache_bytes: "
                f"{self._max_bytes})"
            )
        with self._room:
            self._reserved[folder] = nbytes
            kept = sorted(self._kept())
            used = sum(entry.nbytes for entry in kept) + sum(self._reserved.values())
            for entry in kept:
                if used <= self._max_bytes and self._fits_the_disk(folder):
                    return
                if self._evict(entry):
                    used -= entry.nbytes
                    EVICTIONS.inc()
            if used > self._max_bytes or not self._fits_the_disk(folder):
                del self._reserved[folder]
                raise unavailable(f"the disk cache has no room for its {nbytes} bytes")

    def publish(self, folder: Path, digest: str) -> None:
        """Make a filled folder the entry, at once; a second one of the same content is dropped."""
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            folder.rename(self._entries / digest)
        except OSError:
            if not (self._entries / digest).is_dir():
                raise
            shutil.rmtree(folder, ignore_errors=True)

    def _reclaim(self) -> None:
        """Remove what a dead process has left that nobody can go on with: folders of its own, which
        have a dot in their name, and those that it was about to remove."""
        for folder in self._partial.iterdir() if self._partial.is_dir() else ():
            if "." in folder.name or folder.name.startswith(REMOVED):
                with suppress(FileNotFoundError):  # another process does the same
                    lock = _lock(folder)
                    if lock is not None:
                        shutil.rmtree(folder, ignore_errors=True)
                        os.close(lock)

    def _measure(self) -> None:
        """Say on /metrics how full it is."""
        with self._room:
            kept = list(self._kept())
            USED_BYTES.set(sum(entry.nbytes for entry in kept) + sum(self._reserved.values()))
            ENTRIES.set(sum(entry.folder.parent == self._entries for entry in kept))

    def _kept(self) -> Iterator[_Kept]:
        """All folders that are not being filled by this process."""
        for parent, name in ((self._entries, WEIGHTS_FILE), (self._partial, "")):
            for folder in parent.iterdir() if parent.is_dir() else ():
                if folder not in self._reserved:
                    with suppress(FileNotFoundError):  # another process evicts as well
                        nbytes = _size(folder)
                        yield _Kept(folder.stat().st_mtime, nbytes, folder, folder / name)

    def _evict(self, kept: _Kept) -> bool:
        """Remove it unless somebody uses it; False if somebody does."""
        try:
            lock = _lock(kept.locked)
            if lock is None:
                return False
            try:
                removed = Path(tempfile.mkdtemp(prefix=REMOVED, dir=self._partial))
                kept.folder.rename(removed)  # at once: an entry is whole or is not
                shutil.rmtree(removed, ignore_errors=True)
            finally:
                os.close(lock)
        except FileNotFoundError:  # another process was faster
            return not kept.folder.exists()
        return True

    def _fits_the_disk(self, folder: Path) -> bool:
        """Whether what is still to be written has room on the file system."""
        missing = self._reserved[folder] - _size(folder)
        return shutil.disk_usage(self._partial).free >= missing


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _lock(path: Path) -> int | None:
    """A descriptor that holds the exclusive lock on a file or folder; None if others use it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
