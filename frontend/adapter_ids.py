"""From what clients write for an adapter to its source and the one way its id is written.

The id is part of an adapter's key: one adapter written in two ways would be loaded twice.
"""

import re
from urllib.parse import urlsplit

SOURCE_OF_SCHEME = {"s3": "s3", "http": "http", "https": "http", "pb": "pbase"}
DEFAULT_REVISION = "main"
_SCHEME = re.compile(r"([a-z][a-z0-9]*)://")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def source_of_url(name: str) -> str | None:
    """The source that a name says by its scheme; None when it has none that we know."""
    match = _SCHEME.match(name)
    return SOURCE_OF_SCHEME.get(match[1]) if match else None


def local_path(name: str) -> str:
    """A folder's path below a root, without what leads nowhere. Raises ValueError."""
    id = name.rstrip("/")
    first, *others = id.split("/")
    if not id or first in (".", "..") or not {"", ".", ".."}.isdisjoint(others):
        raise ValueError("must be the path of a folder without `.`, `..` and empty parts")
    return id


def hub_id(name: str) -> tuple[str, str]:
    """`repository@revision`, apart; the revision may be missing, or be the default, which is the
    same. Raises ValueError."""
    repository, at, revision = name.partition("@")
    if not repository or (at and not revision):
        raise ValueError("must be an id, or id@revision")
    return repository, "" if revision == DEFAULT_REVISION else revision


def s3_id(name: str) -> str:
    """`bucket/prefix`, with s3:// or without, as s3://bucket/prefix. Raises ValueError."""
    bucket, _, prefix = name.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if not bucket or not prefix:
        raise ValueError("must be bucket/prefix, or s3://bucket/prefix")
    return f"s3://{bucket}/{prefix}"


def pbase_id(name: str) -> str:
    """`repo/version` or `repo`, with pb:// or without, as pb://... . Raises ValueError."""
    parts = name.removeprefix("pb://").split("/")
    if not 1 <= len(parts) <= 2 or not all(parts):
        raise ValueError("must be repo/version, or repo")
    return f"pb://{'/'.join(parts)}"


def http_id(name: str) -> str:
    """The URL of a folder or an archive. Raises ValueError.

    A secret in it would be seen in logs and lists, so the places where they are put are refused.
    """
    parts = urlsplit(name)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("must be a URL of http or https")
    if "@" in parts.netloc or "?" in name or "#" in name:
        raise ValueError("must be a URL without user, query or fragment; a token is `api_token`")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{parts.port}"
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{host}{port}{path}"
