"""The files for tokenizers of remote adapters: asked about, and downloaded beside the weights.

They are asked about all at once, after the weights: that says who may read them, and where they
lie. One that the server forbids is not there, as stores say it that do not list what they hold.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapter_loader.refusals import unavailable
from adapter_loader.remote.downloads import Ask, Downloads, entry_of
from adapter_loader.remote.http_client import HttpClient
from adapter_loader.remote.text_cache import TextCache
from adapter_loader.remote.transfer import RemoteFile, transfer
from adapter_loader.texts import TEXT_FILES, Texts, check_text_size, read_texts, texts_of
from pipeline.errors import RequestError
from pipeline.messages import FailureKind

T = TypeVar("T")
Found = dict[str, RemoteFile]  # by name


class TextDownloads:
    """Shared by the threads of all sources. Methods raise RequestError."""

    def __init__(self, *, client: HttpClient, downloads: Downloads, cache: TextCache) -> None:
        self._client = client
        self._downloads = downloads
        self._cache = cache

    def folder(self, place: str, whom: str, ask: Ask, known: str, deadline: float) -> Texts | None:
        """Those in an adapter's folder, see Downloads.folder; None if their version is `known`."""
        within = self._downloads.find(ask, deadline).within
        found = self.find(ask, within, deadline)
        named = [f"{name} {file.version} {file.nbytes}" for name, file in found.items()]
        version = entry_of("\n".join([f"texts {place} {within}", *named]))
        return None if version == known else self.fetch(version, version, whom, found, deadline)

    def archive(
        self, place: str, whom: str, suffix: str, ask: Ask, known: str, deadline: float
    ) -> Texts | None:
        """Those in an archive, which is downloaded whole. See Downloads.archive."""
        files, folder = self._downloads.archive_in(place, whom, suffix, ask, deadline)
        try:
            return read_texts(folder, known)
        finally:
            files.close()

    def find(self, ask: Ask, within: str, deadline: float) -> Found:
        """What is said of those that there are, none too large."""
        at = f"{within}/" if within else ""
        jobs = [partial(self._described, ask, at + name, deadline) for name in TEXT_FILES]
        found = {
            name: file
            for name, file in zip(TEXT_FILES, at_once(jobs), strict=True)
            if file is not None
        }
        for name, file in found.items():
            check_text_size(name, file.nbytes)
        return found

    def cached(self, version: str, entry: str) -> Texts | None:
        """What an earlier `fetch` has brought, if it is still there."""
        files = self._cache.get(entry)
        return None if files is None else texts_of(version, files)

    def fetch(self, version: str, entry: str, whom: str, found: Found, deadline: float) -> Texts:
        """What was found, downloaded unless it is cached.

        entry  names it in the cache; another for each that may read it
        """
        cached = self.cached(version, entry)
        if cached is not None:
            return cached
        try:
            with self._cache.scratch() as scratch:
                files = {
                    name: self._downloads.ask(
                        partial(self._download, file, scratch / name, whom, deadline), deadline
                    )
                    for name, file in found.items()
                }
        except OSError as error:
            raise unavailable(f"it could not be stored ({error.strerror})") from error
        self._cache.put(entry, files)
        return texts_of(version, files)

    def _described(self, ask: Ask, name: str, deadline: float) -> RemoteFile | None:
        try:
            return self._downloads.ask(lambda: ask(name), deadline)
        except RequestError as error:
            if error.kind == FailureKind.ADAPTER_FORBIDDEN:
                return None
            raise

    def _download(self, file: RemoteFile, path: Path, whom: str, deadline: float) -> bytes:
        transfer(self._client, file, path, whom, deadline)
        return path.read_bytes()


def at_once(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Their results, in order; raises what the first of them raises that does.

    The threads are daemons: the process may end while a server stalls.
    """
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(at: int) -> None:
        try:
            results[at] = jobs[at]()
        except BaseException as error:  # to be raised in the thread that waits
            errors[at] = error

    threads = [
        threading.Thread(target=run, args=(at,), name=f"ask-{at}", daemon=True)
        for at in range(len(jobs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[at] for at in range(len(jobs))]
