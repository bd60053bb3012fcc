"""Source `hub`: repositories of a Hugging Face hub.

Each fetch first asks the hub about the weight file, with the token of the request: that says
whether the token may read the repository, and which commit the revision is now. huggingface_hub
asks, and knows what the hub's errors mean; the bytes come as those of all other sources, into the
same disk cache. An entry of it belongs to a repository at a commit, and to whoever may read it:
everybody, or the tenant of one token.

What the operator has in the ordinary cache of huggingface_hub is used from there. Only a commit
that the hub has just named to this token is taken from it, or, offline, what it says itself.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapter_loader.refusals import forbidden, invalid, not_found, unavailable
from adapter_loader.remote.downloads import Downloads, RemoteFolder, entry_of
from adapter_loader.remote.http_client import LATER, retry_after
from adapter_loader.remote.last_seen import LastSeen
from adapter_loader.remote.origins import origin_of
from adapter_loader.remote.retries import Interrupted
from adapter_loader.remote.text_downloads import TextDownloads
from adapter_loader.remote.transfer import RemoteFile
from adapter_loader.sources import WEIGHTS_FILE, AdapterFiles, open_files
from adapter_loader.texts import Texts, read_texts
from pipeline.adapter_roots import FOLDERS
from pipeline.messages import AdapterKey

T = TypeVar("T")

WHOM = "the hub"
SERVER = "server"  # whoever reads with the token of the server
# The base class of what its HTTP client raises; which client that is depends on its version.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,199}", re.ASCII)  # becomes part of a path
_TOKEN = re.compile(r"[!-~]{1,1000}")  # becomes part of a header
_SHA256 = re.compile(r"[0-9a-f]{64}")  # as an ETag: of a file in LFS
_COMMIT_HEADER = constants.HUGGINGFACE_HEADER_X_REPO_COMMIT


class HubSource:
    """A hub at `endpoint`.

    share_token    let requests without a token use the server's own
    stall_seconds  how long the hub may take to say something of a file
    commits        what revisions meant when the hub last said it
    cache          the ordinary cache
    """

    def __init__(
        self,
        *,
        downloads: Downloads,
        texts: TextDownloads,
        max_adapter_bytes: int,
        share_token: bool,
        stall_seconds: float,
        commits: LastSeen,
        endpoint: str = constants.ENDPOINT,
        cache: Path = Path(constants.HF_HUB_CACHE),
        offline: bool = constants.HF_HUB_OFFLINE,
    ) -> None:
        self._downloads = downloads
        self._texts = texts
        self._max_adapter_bytes = max_adapter_bytes
        self._share_token = share_token
        self._stall_seconds = stall_seconds
        self._commits = commits
        self._endpoint = endpoint
        self._cache = cache
        self._offline = offline

    def lane(self, key: AdapterKey) -> str:
        """See Source."""
        return key.source

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """See Source."""
        deadline = self._downloads.deadline()
        revision = _checked(key, token)
        if self._offline:
            return self._offline_copy(
                key.id,
                revision,
                token,
                lambda commit, readers: self._cached(key.id, commit, readers, deadline),
            )
        asking = self._asking(key.id, revision, token, deadline)
        found = self._commit(asking, deadline)
        reader = self._reader(token)
        files = self._cached(key.id, asking.commit, (reader, self._reader(None)), deadline)
        if files is None:
            found = found or self._downloads.find(asking.file, deadline)
            entry = _entry(reader, key.id, asking.commit)
            files = self._downloads.fetch(entry, WHOM, found, deadline)
        self._commits.put(_name(reader, key.id, revision), asking.commit)
        return files

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """See Source. Their version is the commit, and the ordinary cache is used offline alone."""
        deadline = self._downloads.deadline()
        revision = _checked(key, token)
        if self._offline:
            texts = self._offline_copy(
                key.id,
                revision,
                token,
                lambda commit, readers: (
                    self._cached_texts(key.id, commit, readers)
                    or _translated(lambda: self._ordinary_texts(key.id, commit))
                ),
            )
            return None if texts.version == known else texts
        asking = self._asking(key.id, revision, token, deadline)
        found = self._commit(asking, deadline)
        version = _texts_entry("", key.id, asking.commit)
        if version == known:
            return None
        reader = self._reader(token)
        texts_there = self._cached_texts(key.id, asking.commit, (reader, self._reader(None)))
        if texts_there is not None:
            return texts_there
        found = found or self._downloads.find(asking.file, deadline)
        files = self._texts.find(asking.file, found.within, deadline)
        entry = _texts_entry(reader, key.id, asking.commit)
        return self._texts.fetch(version, entry, WHOM, files, deadline)

    def _asking(
        self, repository: str, revision: str, token: str | None, deadline: float
    ) -> "_Asking":
        return _Asking(
            repository=repository,
            revision=revision,
            token=token or self._own_token(),
            endpoint=self._endpoint,
            stall_seconds=self._stall_seconds,
            deadline=deadline,
        )

    def _commit(self, asking: "_Asking", deadline: float) -> RemoteFolder | None:
        """Have it learn the commit; what was found on the way, if that was all of it."""
        if self._downloads.ask(lambda: asking.file(WEIGHTS_FILE), deadline) is None:
            return self._downloads.find(asking.file, deadline)
        return None

    def _offline_copy(
        self,
        repository: str,
        revision: str,
        token: str | None,
        find: Callable[[str, tuple[str, str]], T | None],
    ) -> T:
        """What was fetched with this token, or by everybody, or lies in the ordinary cache.

        find  looks for a commit of it, as these readers may read it
        """
        readers = (self._reader(token), self._reader(None))
        known = [self._commits.get(_name(reader, repository, revision)) for reader in readers]
        for commit in (*filter(None, known), revision):
            found = find(commit, readers)
            if found is not None:
                return found
        raise unavailable("it is not in the local cache, and HF_HUB_OFFLINE forbids the hub")

    def _cached_texts(self, repository: str, commit: str, readers: Iterable[str]) -> Texts | None:
        version = _texts_entry("", repository, commit)
        entries = (_texts_entry(reader, repository, commit) for reader in readers)
        found = (self._texts.cached(version, entry) for entry in entries)
        return next((texts for texts in found if texts is not None), None)

    def _ordinary_texts(self, repository: str, revision: str) -> Texts | None:
        """What lies beside the weights in the ordinary cache, if those do."""
        for within in FOLDERS:
            at = f"{within}/" if within else ""
            path = try_to_load_from_cache(repository, at + WEIGHTS_FILE, self._cache, revision)
            if isinstance(path, str):
                return read_texts(Path(path).parent)
        return None

    def _cached(
        self, repository: str, commit: str, readers: Iterable[str], deadline: float
    ) -> AdapterFiles | None:
        """The adapter as it is at a commit, if it lies on disk."""
        for reader in readers:
            files = self._downloads.cached(_entry(reader, repository, commit), deadline)
            if files is not None:
                return files
        return _translated(lambda: self._ordinary(repository, commit))

    def _ordinary(self, repository: str, revision: str) -> AdapterFiles | None:
        """The adapter in the ordinary cache, if it is whole."""
        for within in FOLDERS:
            at = f"{within}/" if within else ""
            path = try_to_load_from_cache(repository, at + WEIGHTS_FILE, self._cache, revision)
            if isinstance(path, str):
                try:
                    return open_files(Path(path).parent, self._max_adapter_bytes)
                except FileNotFoundError:  # no config, or somebody clears the cache
                    continue
        return None

    def _own_token(self) -> str | None:
        if not self._share_token or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            return None
        return get_token()

    def _reader(self, token: str | None) -> str:
        """Who may read what is fetched with the token."""
        if not token:
            return SERVER if self._share_token else ""
        return hashlib.sha256(token.encode()).hexdigest()


def _checked(key: AdapterKey, token: str | None) -> str:
    """The revision. Raises RequestError for one, or a token, that no hub could have."""
    revision = key.revision or constants.DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise not_found("its revision is not the name of a branch, a tag or a commit")
    if token and not _TOKEN.fullmatch(token):
        raise forbidden("the token is not one that a hub could have given")
    return revision


class _Asking:
    """What a hub says of the files of a repository, all of one commit: that of the first answer.

    The first question names a branch, perhaps, that moves on meanwhile. Later ones name the
    commit, and so do the URLs in their answers.
    """

    commit = ""  # of the repository, once the hub has said it

    def __init__(
        self,
        *,
        repository: str,
        revision: str,
        token: str | None,
        endpoint: str,
        stall_seconds: float,
        deadline: float,
    ) -> None:
        self._repository = repository
        self._revision = revision
        self._token = token
        self._endpoint = endpoint
        self._stall_seconds = stall_seconds
        self._deadline = deadline

    def file(self, name: str) -> RemoteFile | None:
        """None when the repository has none of this name. Raises RequestError or Interrupted."""
        return _translated(lambda: self._ask(name))

    def _ask(self, name: str) -> RemoteFile | None:
        url = hf_hub_url(
            self._repository,
            name,
            revision=self.commit or self._revision,
            endpoint=self._endpoint,
        )
        try:
            told = get_hf_file_metadata(
                url,
                token=self._token or False,
                endpoint=self._endpoint,
                timeout=self._patience(),
            )
        except RemoteEntryNotFoundError as error:
            self._learn(error.response.headers.get(_COMMIT_HEADER))
            return None
        self._learn(told.commit_hash)
        if not self.commit:
            raise unavailable("the hub does not say which commit it is")
        if told.commit_hash != self.commit:
            raise unavailable("it changed on the hub while it was fetched")
        if told.size is None:
            raise invalid("the hub does not say how large it is")
        etag = told.etag or ""
        return RemoteFile(
            told.location,
            told.size,
            version=etag,
            sha256=etag if _SHA256.fullmatch(etag) else None,
            headers=self._headers(told.location),
        )

    def _learn(self, commit: str | None) -> None:
        if commit is not None and _REVISION.fullmatch(commit):
            self.commit = self.commit or commit

    def _headers(self, location: str) -> dict[str, str]:
        """Of the download. The token is for the hub, and not for where its files lie."""
        try:
            is_hub = origin_of(location) == origin_of(self._endpoint)
        except ValueError as error:
            raise unavailable("the hub says that it lies where no URL of http leads") from error
        return {"Authorization": f"Bearer {self._token}"} if self._token and is_hub else {}

    def _patience(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Interrupted("it took too long to fetch")
        return min(self._stall_seconds, left)


def _entry(reader: str, repository: str, commit: str) -> str:
    return entry_of(f"hub {reader} {repository} {commit}")


def _texts_entry(reader: str, repository: str, commit: str) -> str:
    return entry_of(f"hub texts {reader} {repository} {commit}")


def _name(reader: str, repository: str, revision: str) -> str:
    return f"hub {reader} {repository} {revision}"


def _translated(job: Callable[[], T]) -> T:
    """Call `job`, and turn what the hub's client raises into a RequestError or Interrupted."""
    try:
        return job()
    except HFValidationError as error:
        raise not_found("it is not the name of a hub repository") from error
    except GatedRepoError as error:
        raise forbidden("the hub wants its terms accepted, by the owner of a token") from error
    except RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            raise not_found("the hub has no such repository") from error
        raise forbidden(
            "the hub has no such repository, or it is private and the token may not read it"
        ) from error
    except RevisionNotFoundError as error:
        raise not_found("the hub's repository has no such revision") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise forbidden(f"the hub does not let it be read (status {status})") from error
        reason = f"the hub answered with status {status}"
        if status in LATER or status >= 500:
            seconds = retry_after(error.response.headers.get("Retry-After"))
            raise Interrupted(reason, seconds) from error
        raise unavailable(reason) from error
    except OfflineModeIsEnabled as error:
        raise unavailable("the hub cannot be reached") from error
    except _TransportError as error:
        raise Interrupted("the hub cannot be reached") from error
