"""Source `pbase`: adapters of Predibase, as LoRAX names them: `repo/version`, or `repo`.

Predibase's gateway says, to whoever has the caller's token, where in its bucket an adapter lies.
It is asked by each fetch, so that nobody reads what another's token has found. The routes are
those that LoRAX asks: the one of version 2 for `repo/version`, and the older one for what that
does not know.
"""

import re
from typing import TypeVar
from urllib.parse import quote

import msgspec

from adapter_loader.refusals import forbidden, invalid, not_found, unavailable
from adapter_loader.remote.downloads import Downloads
from adapter_loader.remote.http_client import MISSING, HttpClient
from adapter_loader.sources import AdapterFiles
from adapter_loader.sources.s3 import S3Store
from adapter_loader.texts import Texts
from pipeline.messages import AdapterKey

WHOM = "the Predibase gateway"
MAX_REPLY_BYTES = 1 << 20
T = TypeVar("T")
_ID = re.compile(r"pb://(?P<repo>[^/]+)(/(?P<version>[^/]+))?")


class _Version(msgspec.Struct, rename="camel"):
    """Of GET /v2/repos/{repo}/version/{version}."""

    adapter_path: str | None = None  # none while it is trained


class _OldVersion(msgspec.Struct, rename={"best_run_id": "bestRunID"}):
    """Of GET /v1/models/version/name/{repo}."""

    uuid: str
    best_run_id: str


class PbaseSource:
    """gateway is a URL; bucket is where the paths that it gives lie."""

    def __init__(
        self,
        *,
        gateway: str,
        bucket: str,
        client: HttpClient,
        downloads: Downloads,
        store: S3Store,
    ) -> None:
        self._gateway = gateway.rstrip("/")
        self._bucket = bucket
        self._client = client
        self._downloads = downloads
        self._store = store

    def lane(self, key: AdapterKey) -> str:
        """See Source."""
        return key.source

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """See Source."""
        place, prefix, deadline = self._place(key, token)
        return self._store.fetch(place, self._bucket, prefix, deadline)

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """See Source."""
        place, prefix, deadline = self._place(key, token)
        return self._store.texts(place, self._bucket, prefix, known, deadline)

    def _place(self, key: AdapterKey, token: str | None) -> tuple[str, str, float]:
        """Place and prefix, see S3Store, and the deadline of it all. Raises RequestError."""
        match = _ID.fullmatch(key.id)
        if match is None or {match["repo"], match["version"]} & {".", ".."}:
            raise invalid("its id is not pb://repo/version")
        if not token:
            raise forbidden("source pbase needs a token of Predibase in the request")
        repo, version, secret = match["repo"], match["version"], token
        deadline = self._downloads.deadline()
        path = self._downloads.ask(lambda: self._resolve(repo, version, secret, deadline), deadline)
        prefix = path.removeprefix(f"s3://{self._bucket}/").strip("/")
        if not prefix or "://" in prefix:
            raise unavailable(f"{WHOM} says that it lies outside the bucket of this server")
        return f"{key.source} {key.scope}", prefix, deadline

    def _resolve(self, repo: str, version: str | None, token: str, deadline: float) -> str:
        """Where in the bucket it lies. Raises RequestError or Interrupted."""
        repo = quote(repo, safe="")
        query = ""
        if version is not None:
            version = quote(version, safe="")
            found = self._get(f"/v2/repos/{repo}/version/{version}", _Version, token, deadline)
            if found is not None and found.adapter_path is None:
                raise unavailable("it is not yet available: its training has not written it")
            if found is not None and found.adapter_path is not None:
                return found.adapter_path
            query = f"?version={version}"
        old = self._get(f"/v1/models/version/name/{repo}{query}", _OldVersion, token, deadline)
        if old is None:
            raise not_found("Predibase has no such adapter")
        return f"{old.uuid}/{old.best_run_id}/artifacts/model/model_weights"

    def _get(self, path: str, kind: type[T], token: str, deadline: float) -> T | None:
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        with self._client.open("GET", self._gateway + path, headers, deadline) as response:
            if response.status in MISSING:
                return None
            response.check(WHOM)
            body = response.read(MAX_REPLY_BYTES)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise unavailable(f"{WHOM} answers what is not understood") from error
