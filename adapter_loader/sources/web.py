"""Source `http`: an adapter's folder, or an archive of it, on a web server that is allowed.

The id is its URL. Whoever may read it is for the server to say: the request's token goes to it as
a bearer token, and each fetch asks the server anew.
"""

import base64
import binascii
import re
from collections.abc import Collection, Mapping
from email.message import Message
from urllib.parse import quote, urlsplit

from adapter_loader.refusals import forbidden, invalid, unavailable
from adapter_loader.remote.archive import ARCHIVES
from adapter_loader.remote.downloads import Ask, Downloads
from adapter_loader.remote.http_client import MISSING, HttpClient
from adapter_loader.remote.origins import Origin, origin_of
from adapter_loader.remote.text_downloads import TextDownloads
from adapter_loader.remote.transfer import RemoteFile
from adapter_loader.sources import AdapterFiles
from adapter_loader.texts import Texts
from pipeline.messages import AdapterKey

NO_HEAD = (405, 501)
_IN_A_PATH = "/%:@!$&'()*+,;=~"
_LENGTH = re.compile(r"[0-9]{1,18}")
_SHA256 = re.compile(r"\bsha-256=:([A-Za-z0-9+/=]{44}):", re.ASCII)  # RFC 9530


class HttpSource:
    """named: the origins that adapters may come from."""

    def __init__(
        self,
        *,
        named: Collection[Origin],
        client: HttpClient,
        downloads: Downloads,
        texts: TextDownloads,
    ) -> None:
        self._named = frozenset(named)
        self._client = client
        self._downloads = downloads
        self._texts = texts

    def lane(self, key: AdapterKey) -> str:
        """See Source: each server has its own."""
        try:
            origin = origin_of(key.id)
        except ValueError:
            return key.source
        return str(origin) if origin in self._named else key.source

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """See Source."""
        place, whom, suffix, ask, deadline = self._place(key, token)
        if suffix:
            return self._downloads.archive(place, whom, suffix, ask, deadline)
        return self._downloads.folder(place, whom, ask, deadline)

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """See Source."""
        place, whom, suffix, ask, deadline = self._place(key, token)
        if suffix:
            return self._texts.archive(place, whom, suffix, ask, known, deadline)
        return self._texts.folder(place, whom, ask, known, deadline)

    def _place(self, key: AdapterKey, token: str | None) -> tuple[str, str, str, Ask, float]:
        """What Downloads has to know: place, whom, the suffix of an archive, ask and deadline."""
        origin, url = self._checked(key.id)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        whom = f"the host {origin.host}"
        deadline = self._downloads.deadline()
        suffix = next((suffix for suffix in ARCHIVES if url.endswith(suffix)), "")
        folder = url if suffix else f"{url}/"

        def ask(name: str) -> RemoteFile | None:
            return self._describe(f"{folder}{name}", headers, whom, deadline)

        return f"{key.source} {key.scope} {url}", whom, suffix, ask, deadline

    def _checked(self, id: str) -> tuple[Origin, str]:
        """Whom to ask for what. Raises RequestError."""
        try:
            origin = origin_of(id)
        except ValueError as error:
            raise invalid("its id is not an http or https URL") from error
        if origin not in self._named:
            raise forbidden(f"{origin} is not one of the hosts that adapters may come from")
        return origin, str(origin) + quote(urlsplit(id).path.rstrip("/"), safe=_IN_A_PATH)

    def _describe(
        self, url: str, headers: Mapping[str, str], whom: str, deadline: float
    ) -> RemoteFile | None:
        """What the server says of a file. Not every server knows HEAD; a GET is cut off then."""
        for method in ("HEAD", "GET"):
            with self._client.open(method, url, headers, deadline) as response:
                if method == "HEAD" and response.status in NO_HEAD:
                    continue
                if response.status in MISSING:
                    return None
                response.check(whom)
                return _described(url, headers, response.headers)
        raise unavailable(f"{whom} lets no file be read")


def _described(url: str, headers: Mapping[str, str], told: Message) -> RemoteFile:
    """Raises RequestError when size or version are not told."""
    length = told.get("Content-Length", "")
    etag, date = told.get("ETag"), told.get("Last-Modified")
    version = etag or date
    if not _LENGTH.fullmatch(length):
        raise invalid("its server does not say how large it is (Content-Length)")
    if version is None:
        raise invalid(
            "its server tells neither ETag nor Last-Modified, so that a change would go unnoticed"
        )
    sha256 = _sha256(told.get("Repr-Digest", ""))
    return RemoteFile(url, int(length), version, etag, date, sha256, headers)


def _sha256(digests: str) -> str | None:
    match = _SHA256.search(digests)
    if match is None:
        return None
    try:
        return base64.b64decode(match[1], validate=True).hex()
    except binascii.Error:
        return None
