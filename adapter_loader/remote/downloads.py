"""From a description of remote files to an open adapter: cached, downloaded, checked.

Sources differ in how they find files and who may read them. What follows is the same for all: a
place and the versions of its files name an entry of the disk cache, which is opened, or filled
first. The description is asked for by each fetch, cached or not: it is also what says that the
caller may read the files.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapter_loader.refusals import invalid, not_found, unavailable
from adapter_loader.remote.archive import SLACK_BYTES, unpack
from adapter_loader.remote.disk_cache import DiskCache
from adapter_loader.remote.http_client import HttpClient
from adapter_loader.remote.retries import Interrupted, Retries
from adapter_loader.remote.transfer import RemoteFile, transfer
from adapter_loader.sources import (
    MAX_CONFIG_BYTES,
    PICKLE_FILE,
    PICKLE_ONLY,
    WEIGHTS_FILE,
    AdapterFiles,
    too_large,
)
from pipeline.adapter_roots import CONFIG_FILE, FOLDERS

ARCHIVE_FILE = "archive"

T = TypeVar("T")
# name of a file -> what its server says of it; None: it has no such file
Ask = Callable[[str], RemoteFile | None]


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """An adapter whose two files lie side by side. within is one of FOLDERS."""

    within: str
    config: RemoteFile
    weights: RemoteFile


class Downloads:
    """Shared by the threads of all sources. Methods raise RequestError.

    A fetch has one deadline for all that it does, on time.monotonic().
    """

    def __init__(
        self, *, client: HttpClient, cache: DiskCache, retries: Retries, max_adapter_bytes: int
    ) -> None:
        self._client = client
        self._cache = cache
        self._retries = retries
        self._max_adapter_bytes = max_adapter_bytes
        self._filling_lock = threading.Lock()
        self._filling: dict[str, tuple[threading.Lock, int]] = {}  # entry -> who fills it or waits

    def deadline(self) -> float:
        """Of a fetch that begins now."""
        return self._retries.deadline()

    def ask(self, job: Callable[[], T], deadline: float) -> T:
        """Run the job until it is not interrupted."""
        return self._retries.run(job, deadline)

    def folder(self, place: str, whom: str, ask: Ask, deadline: float) -> AdapterFiles:
        """The adapter in a folder.

        place  where: the source, and whatever else tells its adapters apart, tenants included
        whom   what errors call the server
        """
        found = self.find(ask, deadline)
        entry = entry_of(f"{place} {found.within}", (found.config, found.weights))
        return self.fetch(entry, whom, found, deadline)

    def find(self, ask: Ask, deadline: float) -> RemoteFolder:
        """The adapter's files: in the folder that is asked about, or where Ludwig puts them."""
        return self._retries.run(lambda: self._find(ask), deadline)

    def cached(self, entry: str, deadline: float) -> AdapterFiles | None:
        """What an earlier fetch has brought; None if that is not there."""
        return self._retries.run(lambda: self._cache.open(entry, self._max_adapter_bytes), deadline)

    def fetch(self, entry: str, whom: str, found: RemoteFolder, deadline: float) -> AdapterFiles:
        """The files of an entry, downloaded unless they are cached. See `folder`."""

        def fill(folder: Path) -> None:
            self._cache.reserve(folder, found.config.nbytes + found.weights.nbytes)
            for name, file in ((CONFIG_FILE, found.config), (WEIGHTS_FILE, found.weights)):
                transfer(self._client, file, folder / name, whom, deadline)

        return self._opened(entry, fill, deadline)

    def archive(
        self, place: str, whom: str, suffix: str, ask: Ask, deadline: float
    ) -> AdapterFiles:
        """An adapter in one archive. See `folder`.

        suffix  one of archive.ARCHIVES
        ask     is asked for the name ""
        """
        return self.archive_in(place, whom, suffix, ask, deadline)[0]

    def archive_in(
        self, place: str, whom: str, suffix: str, ask: Ask, deadline: float
    ) -> tuple[AdapterFiles, Path]:
        """The same, and the folder with all that was taken out, which stays as the files do."""
        file = self._retries.run(lambda: ask(""), deadline)
        if file is None:
            raise not_found(f"{whom} has no such archive")
        most = self._max_adapter_bytes + SLACK_BYTES
        if file.nbytes > most:
            raise invalid(f"the archive has {file.nbytes} bytes, and {most} is the most")

        def fill(folder: Path) -> None:
            def reserve(nbytes: int) -> None:
                self._cache.reserve(folder, file.nbytes + nbytes)

            reserve(0)
            packed = folder / ARCHIVE_FILE
            transfer(self._client, file, packed, whom, deadline)
            unpack(packed, suffix, folder, self._max_adapter_bytes, reserve)
            packed.unlink()

        entry = entry_of(f"{place} with texts", (file,))
        with self._alone(entry, deadline):
            return self._opened(entry, fill, deadline), self._cache.folder_of(entry)

    @contextmanager
    def _alone(self, entry: str, deadline: float) -> Iterator[None]:
        """Who fills an entry; a second one waits, and finds it filled. Raises RequestError."""
        with self._filling_lock:
            lock, waiting = self._filling.get(entry, (threading.Lock(), 0))
            self._filling[entry] = (lock, waiting + 1)
        try:
            if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise unavailable("it took too long to fetch")
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._filling_lock:
                _, waiting = self._filling.pop(entry)
                if waiting > 1:
                    self._filling[entry] = (lock, waiting - 1)

    def _find(self, ask: Ask) -> RemoteFolder:
        """Config and weights, both there and neither too large."""
        for within in FOLDERS:
            at = f"{within}/" if within else ""
            weights = ask(at + WEIGHTS_FILE)
            config = ask(at + CONFIG_FILE)
            if config is None and weights is None:
                continue
            if config is None:
                raise invalid(f"has no {CONFIG_FILE}")
            if weights is None:
                pickled = ask(at + PICKLE_FILE) is not None
                raise invalid(PICKLE_ONLY if pickled else f"has no {WEIGHTS_FILE}")
            if config.nbytes > MAX_CONFIG_BYTES:
                raise invalid(
                    f"{CONFIG_FILE} has {config.nbytes} bytes, and {MAX_CONFIG_BYTES} is the most"
                )
            if weights.nbytes > self._max_adapter_bytes:
                raise too_large(weights.nbytes, self._max_adapter_bytes)
            return RemoteFolder(within, config, weights)
        raise not_found(f"has no {CONFIG_FILE}")

    def _opened(self, entry: str, fill: Callable[[Path], None], deadline: float) -> AdapterFiles:
        def attempt() -> AdapterFiles:
            files = self._cache.open(entry, self._max_adapter_bytes)
            if files is None:
                with self._cache.filling(entry) as folder:
                    fill(folder)
                    self._cache.publish(folder, entry)
                files = self._cache.open(entry, self._max_adapter_bytes)
            if files is None:
                raise Interrupted("it went away from the disk cache while it was opened")
            return files

        return self._retries.run(attempt, deadline)


def entry_of(place: str, files: Sequence[RemoteFile] = ()) -> str:
    """Names the entry of these versions of the files at this place."""
    parts = [place, *(f"{file.version} {file.nbytes}" for file in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
