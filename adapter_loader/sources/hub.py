"""Source `hub`: repositories of a Hugging Face hub, kept in a cache on disk.

Each fetch first asks the hub about the weight file, with the token of the request: that says
whether the token may read it, which commit the revision is now, and how large the file is. Files
of that commit are then taken from the cache or downloaded. huggingface_hub by itself would fall
back to the cache when the hub refuses or cannot be reached, which must not happen here: what is
in the cache was read with somebody's rights.

What a request's own token reads lies in a cache of that token alone. Everybody else, offline mode
included, uses the ordinary cache of this machine's user, which is the operator's to fill.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapter_loader.refusals import forbidden, invalid, not_found, unavailable
from adapter_loader.remote.http_client import LATER
from adapter_loader.remote.retries import Interrupted, Retries
from adapter_loader.sources import (
    PICKLE_FILE,
    PICKLE_ONLY,
    WEIGHTS_FILE,
    AdapterFiles,
    open_files,
    too_large,
)
from pipeline.adapter_roots import CONFIG_FILE
from pipeline.messages import AdapterKey

T = TypeVar("T")

# The base class of what its HTTP client raises; which client that is depends on its version.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,199}", re.ASCII)  # becomes part of a path
_TOKEN = re.compile(r"[!-~]{1,1000}")  # becomes part of a header


class HubSource:
    """A hub at `endpoint`, with its cache.

    token_caches  folder for the caches of tokens
    share_token   let requests without a token use the server's own
    retries       how often a hub that fails is asked
    """

    def __init__(
        self,
        *,
        token_caches: Path,
        max_adapter_bytes: int,
        share_token: bool,
        retries: Retries,
        endpoint: str = constants.ENDPOINT,
        cache: Path = Path(constants.HF_HUB_CACHE),
        offline: bool = constants.HF_HUB_OFFLINE,
    ) -> None:
        self._token_caches = token_caches
        self._max_adapter_bytes = max_adapter_bytes
        self._share_token = share_token
        self._retries = retries
        self._endpoint = endpoint
        self._cache = cache
        self._offline = offline

    def lane(self, key: AdapterKey) -> str:
        """See Source."""
        return key.source

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        revision = key.revision or constants.DEFAULT_REVISION
        if not _REVISION.fullmatch(revision):
            raise not_found("its revision is not the name of a branch, a tag or a commit")
        if token and not _TOKEN.fullmatch(token):
            raise forbidden("the token is not one that a hub could have given")
        if self._offline:
            folder = _translated(lambda: self._find_offline(key.id, revision, token))
        else:
            folder = self._retries.run(
                lambda: _translated(lambda: self._find(key.id, revision, token)),
                self._retries.deadline(),
            )
        try:
            return open_files(folder, self._max_adapter_bytes)
        except FileNotFoundError as error:  # somebody cleared the cache
            raise unavailable("it went away from the cache while it was read") from error

    def _find(self, repository: str, revision: str, token: str | None) -> Path:
        """The snapshot's folder, downloaded first where it is not cached."""
        sent: str | bool | None = token or (None if self._share_token else False)
        cache = self._cache_of(token)
        self._token_caches.mkdir(mode=0o700, parents=True, exist_ok=True)
        commit = self._ask(repository, revision, sent)
        folder = self._cached(repository, revision, cache)
        if folder is None or folder.name != commit:
            folder = self._download(repository, CONFIG_FILE, revision, sent, cache)
            if folder != self._download(repository, WEIGHTS_FILE, revision, sent, cache):
                raise unavailable("it changed on the hub while it was fetched")
        if folder.name != commit:
            raise unavailable("it changed on the hub while it was fetched")
        return folder

    def _ask(self, repository: str, revision: str, token: str | bool | None) -> str | None:
        """The commit that the revision is now, if this token may read its weights."""
        try:
            weights = self._metadata(repository, WEIGHTS_FILE, revision, token)
        except EntryNotFoundError as error:
            try:
                self._metadata(repository, PICKLE_FILE, revision, token)
            except EntryNotFoundError:
                raise invalid(f"has no {WEIGHTS_FILE}") from error
            raise invalid(PICKLE_ONLY) from error
        commit, nbytes = weights
        if nbytes is not None and nbytes > self._max_adapter_bytes:
            raise too_large(nbytes, self._max_adapter_bytes)
        return commit

    def _metadata(
        self, repository: str, name: str, revision: str, token: str | bool | None
    ) -> tuple[str | None, int | None]:
        url = hf_hub_url(repository, name, revision=revision, endpoint=self._endpoint)
        metadata = get_hf_file_metadata(url, token=token, endpoint=self._endpoint)
        return metadata.commit_hash, metadata.size

    def _download(
        self, repository: str, name: str, revision: str, token: str | bool | None, cache: Path
    ) -> Path:
        path = hf_hub_download(
            repository,
            name,
            revision=revision,
            token=token,
            cache_dir=cache,
            endpoint=self._endpoint,
        )
        return Path(path).parent

    def _find_offline(self, repository: str, revision: str, token: str | None) -> Path:
        """The snapshot's folder, in the token's cache or in the ordinary one."""
        for cache in (self._cache_of(token), self._cache):
            folder = self._cached(repository, revision, cache)
            if folder is not None:
                return folder
        raise unavailable("it is not in the local cache, and HF_HUB_OFFLINE forbids the hub")

    def _cached(self, repository: str, revision: str, cache: Path) -> Path | None:
        """The snapshot's folder if both files are in it."""
        path = try_to_load_from_cache(repository, WEIGHTS_FILE, cache, revision)
        if not isinstance(path, str) or not (Path(path).parent / CONFIG_FILE).exists():
            return None
        return Path(path).parent

    def _cache_of(self, token: str | None) -> Path:
        if not token:
            return self._cache
        return self._token_caches / hashlib.sha256(token.encode()).hexdigest()[:32]


def _translated(find: Callable[[], T]) -> T:
    """Call `find`, and turn what the hub's client raises into a RequestError or Interrupted."""
    try:
        return find()
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
    except LocalEntryNotFoundError as error:
        raise Interrupted("the hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise invalid(f"has no {CONFIG_FILE}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise forbidden(f"the hub does not let it be read (status {status})") from error
        reason = f"the hub answered with status {status}"
        raise (Interrupted if status in LATER or status >= 500 else unavailable)(reason) from error
    except OfflineModeIsEnabled as error:
        raise unavailable("the hub cannot be reached") from error
    except _TransportError as error:
        raise Interrupted("the hub cannot be reached") from error
    except OSError as error:
        raise unavailable(f"it could not be stored ({error.strerror})") from error
