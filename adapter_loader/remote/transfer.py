"""One file from a URL into a file on disk, going on where an earlier attempt was cut off.

Ranges and their conditions are those of RFC 9110, section 14: `If-Range` gives the rest of the file
if it is still the same one, and the whole of it otherwise.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapter_loader.refusals import unavailable
from adapter_loader.remote.http_client import HttpClient, Response
from adapter_loader.remote.retries import Interrupted

CHUNK_BYTES = 1 << 20
CHANGED = "it changed while it was fetched"
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its server describes it, before it is fetched.

    version  equal for equal content at one place
    etag     what a reply from this URL has as its ETag, if it has one; may be weak
    date     its Last-Modified
    sha256   hexadecimal, where the server tells it
    """

    url: str = field(repr=False)  # may be signed
    nbytes: int
    version: str
    etag: str | None = None
    date: str | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def condition(self) -> str | None:
        """What may stand in If-Range: a strong ETag, or a date without an ETag."""
        if self.etag is None:
            return self.date
        return None if self.etag.startswith("W/") else self.etag

    @property
    def resumes(self) -> bool:
        """Whether the rest can be asked for: a checksum finds out if it is of another file."""
        return self.condition is not None or self.sha256 is not None


def transfer(client: HttpClient, file: RemoteFile, path: Path, whom: str, deadline: float) -> None:
    """One attempt to make `path` the whole file. What has come stays when it is cut off.

    whom    what errors call the server
    raises  Interrupted, RequestError, or OSError of the disk
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        have = os.fstat(descriptor).st_size
        if have > file.nbytes or not file.resumes:
            os.ftruncate(descriptor, 0)
            have = 0
        if have < file.nbytes:
            _receive(client, file, descriptor, have, whom, deadline)
        _check(file, descriptor)
    finally:
        os.close(descriptor)


def _receive(
    client: HttpClient, file: RemoteFile, descriptor: int, have: int, whom: str, deadline: float
) -> None:
    headers = dict(file.headers)
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.condition is not None:
            headers["If-Range"] = file.condition
    with client.open("GET", file.url, headers, deadline) as response:
        if response.status == 416:
            os.ftruncate(descriptor, 0)
            raise Interrupted(CHANGED)
        response.check(whom)
        offset = _offset(response, file, have)
        os.ftruncate(descriptor, offset)
        while offset < file.nbytes:
            data = response.read_some(min(CHUNK_BYTES, file.nbytes - offset))
            if not data:
                raise Interrupted("the connection ended early")
            os.pwrite(descriptor, data, offset)
            offset += len(data)
        if response.read_some(1):  # nothing has said how long it would be
            os.ftruncate(descriptor, 0)
            raise unavailable(CHANGED)


def _offset(response: Response, file: RemoteFile, have: int) -> int:
    """Where the reply's first byte belongs. Raises RequestError when it is of another file."""
    etag = response.headers.get("ETag")
    if etag is not None and file.etag is not None and etag != file.etag:
        raise unavailable(CHANGED)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise unavailable("the server sends it compressed, which was not asked for")
    if response.status != 206:
        length = response.headers.get("Content-Length")
        if length is not None and length != str(file.nbytes):
            raise unavailable(CHANGED)
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != have or int(match[3]) != file.nbytes:
        raise unavailable(CHANGED)
    return have


def _check(file: RemoteFile, descriptor: int) -> None:
    """Compare with the checksum; what does not have it is thrown away. Raises Interrupted."""
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(descriptor, CHUNK_BYTES, offset):
        digest.update(data)
        offset += len(data)
    if digest.hexdigest() != file.sha256:
        os.ftruncate(descriptor, 0)
        raise Interrupted("what came does not have the checksum (sha256) that its source tells")
