"""From a description of remote files to an open adapter: cached, downloaded, checked.

Sources differ in how they find files and who may read them. What follows is the same for all: a
place and the versions of its files name an entry of the disk cache, which is opened, or filled
first. The description is asked for by each fetch, cached or not: it is also what says that the
caller may read the files.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from adapter_loader.refusals import invalid, not_found
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
from pipeline.adapter_roots import CONFIG_FILE

ARCHIVE_FILE = "archive"

T = TypeVar("T")
# (name of a file, deadline) -> what its server says of it; None: it has no such file
Ask = Callable[[str, float], RemoteFile | None]


class Downloads:
    """Shared by the threads of all sources. Methods raise RequestError."""

    def __init__(
        self, *, client: HttpClient, cache: DiskCache, retries: Retries, max_adapter_bytes: int
    ) -> None:
        self._client = client
        self._cache = cache
        self._retries = retries
        self._max_adapter_bytes = max_adapter_bytes

    def ask(self, job: Callable[[float], T]) -> T:
        """Run job(deadline) until it is not interrupted."""
        deadline = self._retries.deadline()
        return self._retries.run(lambda: job(deadline), deadline)

    def folder(self, place: str, whom: str, ask: Ask) -> AdapterFiles:
        """An adapter whose two files lie side by side.

        place  where: the source, and whatever else tells its adapters apart, tenants included
        whom   what errors call the server
        """
        deadline = self._retries.deadline()
        config, weights = self._retries.run(lambda: self._described(ask, deadline), deadline)

        def fill(folder: Path) -> None:
            self._cache.reserve(folder, config.nbytes + weights.nbytes)
            for name, file in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
                transfer(self._client, file, folder / name, whom, deadline)

        return self._cached(_digest(place, (config, weights)), fill, deadline)

    def archive(self, place: str, whom: str, name: str, suffix: str, ask: Ask) -> AdapterFiles:
        """An adapter in one archive. See `folder`.

        suffix  one of archive.ARCHIVES
        """
        deadline = self._retries.deadline()
        file = self._retries.run(lambda: ask(name, deadline), deadline)
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

        return self._cached(_digest(place, (file,)), fill, deadline)

    def _described(self, ask: Ask, deadline: float) -> tuple[RemoteFile, RemoteFile]:
        """Config and weights, both there and neither too large."""
        weights = ask(WEIGHTS_FILE, deadline)
        config = ask(CONFIG_FILE, deadline)
        if config is None:
            raise (invalid if weights else not_found)(f"has no {CONFIG_FILE}")
        if weights is None:
            pickled = ask(PICKLE_FILE, deadline) is not None
            raise invalid(PICKLE_ONLY if pickled else f"has no {WEIGHTS_FILE}")
        if config.nbytes > MAX_CONFIG_BYTES:
            raise invalid(
                f"{CONFIG_FILE} has {config.nbytes} bytes, and {MAX_CONFIG_BYTES} is the most"
            )
        if weights.nbytes > self._max_adapter_bytes:
            raise too_large(weights.nbytes, self._max_adapter_bytes)
        return config, weights

    def _cached(self, digest: str, fill: Callable[[Path], None], deadline: float) -> AdapterFiles:
        def attempt() -> AdapterFiles:
            files = self._cache.open(digest, self._max_adapter_bytes)
            if files is None:
                with self._cache.filling(digest) as folder:
                    fill(folder)
                    self._cache.publish(folder, digest)
                files = self._cache.open(digest, self._max_adapter_bytes)
            if files is None:
                raise Interrupted("it went away from the disk cache while it was opened")
            return files

        return self._retries.run(attempt, deadline)


def _digest(place: str, files: Sequence[RemoteFile]) -> str:
    """Names the entry of these versions of the files at this place."""
    parts = [place, *(f"{file.version} {file.nbytes}" for file in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
