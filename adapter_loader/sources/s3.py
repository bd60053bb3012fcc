"""Source `s3`: an adapter's folder in a bucket of S3, or of anything that speaks its protocol.

botocore finds the credentials, signs, and asks about objects; it is kept up by those who make the
protocol. The bytes come over a signed URL, as from any web server, so that they are resumed and
bounded like all others.

The credentials are the server's own: every client may read what they may, in the buckets that are
named in the settings.
"""

import base64
import re
from collections.abc import Collection
from typing import Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from adapter_loader.refusals import forbidden, invalid, unavailable
from adapter_loader.remote.downloads import Ask, Downloads
from adapter_loader.remote.http_client import LATER, Limits, retry_after
from adapter_loader.remote.retries import Interrupted
from adapter_loader.remote.text_downloads import TextDownloads
from adapter_loader.remote.transfer import RemoteFile
from adapter_loader.sources import AdapterFiles
from adapter_loader.texts import Texts
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey

SIGNED_SECONDS = 3600  # how long a URL may be used, retries and resuming included
DEFAULT_REGION = "us-east-1"
WHOM = "the store"
_ID = re.compile(r"s3://(?P<bucket>[^/]+)/(?P<prefix>.*[^/])/*")
_SHA256 = re.compile(r"[A-Za-z0-9+/]{43}=", re.ASCII)  # of the whole object; parts have a suffix


class S3Store:
    """The objects that the server's credentials may read at an endpoint.

    endpoint  empty: what botocore finds in its environment, or AWS
    """

    def __init__(
        self, *, endpoint: str, limits: Limits, downloads: Downloads, texts: TextDownloads
    ) -> None:
        session = botocore.session.get_session()
        signature = "s3v4" if session.get_credentials() else UNSIGNED  # for public buckets
        self._client: Any = session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or DEFAULT_REGION,
            endpoint_url=endpoint or None,
            config=Config(
                signature_version=signature,
                connect_timeout=limits.connect_seconds,
                read_timeout=limits.stall_seconds,
                retries={"total_max_attempts": 1},  # Downloads tries again
                s3={"addressing_style": "path"} if endpoint else None,
            ),
        )
        self._downloads = downloads
        self._texts = texts

    def fetch(
        self, place: str, bucket: str, prefix: str, deadline: float | None = None
    ) -> AdapterFiles:
        """The adapter below a prefix. Raises RequestError.

        place     see Downloads.folder
        deadline  of a fetch that has begun already
        """
        until = self._downloads.deadline() if deadline is None else deadline
        ask = self._ask(bucket, prefix)
        return self._downloads.folder(f"{place} {bucket}/{prefix}", WHOM, ask, until)

    def texts(
        self, place: str, bucket: str, prefix: str, known: str, deadline: float | None = None
    ) -> Texts | None:
        """What lies there for tokenizers. See `fetch`, and Source.texts."""
        until = self._downloads.deadline() if deadline is None else deadline
        ask = self._ask(bucket, prefix)
        return self._texts.folder(f"{place} {bucket}/{prefix}", WHOM, ask, known, until)

    def _ask(self, bucket: str, prefix: str) -> Ask:
        return lambda name: self._describe(bucket, f"{prefix}/{name}")

    def _describe(self, bucket: str, name: str) -> RemoteFile | None:
        wanted = {"Bucket": bucket, "Key": name}
        try:
            head = self._client.head_object(**wanted, ChecksumMode="ENABLED")
            url = self._client.generate_presigned_url(
                "get_object", Params=wanted, ExpiresIn=SIGNED_SECONDS
            )
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise _refusal(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise unavailable("this server has no credentials for the store") from error
        except (ConnectionError, HTTPClientError) as error:
            raise Interrupted("the store cannot be reached") from error
        except BotoCoreError as error:
            raise invalid("its id is not the name of a bucket and a prefix") from error
        etag = head["ETag"]
        return RemoteFile(url, head["ContentLength"], etag, etag, sha256=_sha256(head))


class S3Source:
    """buckets: those that adapters may come from."""

    def __init__(self, *, buckets: Collection[str], store: S3Store) -> None:
        self._buckets = frozenset(buckets)
        self._store = store

    def lane(self, key: AdapterKey) -> str:
        """See Source."""
        return key.source

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """See Source. There is no use for a token."""
        return self._store.fetch(key.source, *self._place(key))

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """See Source."""
        return self._store.texts(key.source, *self._place(key), known)

    def _place(self, key: AdapterKey) -> tuple[str, str]:
        """Bucket and prefix. Raises RequestError."""
        match = _ID.fullmatch(key.id)
        if match is None:
            raise invalid("its id is not s3://bucket/prefix")
        if match["bucket"] not in self._buckets:
            raise forbidden("its bucket is not one that adapters may come from")
        return match["bucket"], match["prefix"]


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))


def _refusal(error: ClientError) -> RequestError | Interrupted:
    status = _status(error)
    if status in (400, 401, 403):  # an expired token is a 400
        return forbidden(f"{WHOM} does not let this server read it (status {status})")
    reason = f"{WHOM} answered with status {status}"
    if status in LATER or status >= 500:
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
        return Interrupted(reason, retry_after(headers.get("retry-after")))
    return unavailable(reason)


def _sha256(head: dict[str, Any]) -> str | None:
    checksum = head.get("ChecksumSHA256", "")
    return base64.b64decode(checksum).hex() if _SHA256.fullmatch(checksum) else None
