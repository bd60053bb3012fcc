"""The parts of remote sources, with waits that take no time."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapter_loader.remote.disk_cache import DiskCache
from adapter_loader.remote.downloads import Downloads
from adapter_loader.remote.http_client import HttpClient, Limits
from adapter_loader.remote.origins import named_origin
from adapter_loader.remote.retries import Retries
from adapter_loader.remote.text_cache import TextCache
from adapter_loader.remote.text_downloads import TextDownloads
from adapter_loader.sources import Source
from adapter_loader.sources.web import HttpSource
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind

MAX_BYTES = 1 << 20
TRIES = 3


@dataclass
class Parts:
    """What sources share. waits are the seconds that would have been slept."""

    folder: Path
    client: HttpClient
    cache: DiskCache
    downloads: Downloads
    texts: TextDownloads
    waits: list[float] = field(default_factory=list)


def parts(
    folder: Path,
    *named: str,
    cache_bytes: int = 10 * MAX_BYTES,
    stall_seconds: float = 30,
    seconds: float = 60,
) -> Parts:
    waits: list[float] = []
    client = HttpClient(
        limits=Limits(10, stall_seconds), named=[named_origin(name) for name in named]
    )
    cache = DiskCache(folder=folder, max_bytes=cache_bytes)
    retries = Retries(tries=TRIES, seconds=seconds, sleep=waits.append)
    downloads = Downloads(client=client, cache=cache, retries=retries, max_adapter_bytes=MAX_BYTES)
    texts = TextDownloads(client=client, downloads=downloads, cache=TextCache(folder / "texts"))
    return Parts(folder, client, cache, downloads, texts, waits)


def http_source(made: Parts, *named: str) -> HttpSource:
    return HttpSource(
        named=[named_origin(name) for name in named],
        client=made.client,
        downloads=made.downloads,
        texts=made.texts,
    )


def weights_of(source: Source, key: AdapterKey, token: str | None = None) -> bytes:
    fetched = source.fetch(key, token)
    try:
        return os.pread(fetched.weights, fetched.weights_bytes, 0)
    finally:
        fetched.close()


def assert_refused(
    source: Source, key: AdapterKey, kind: FailureKind, *words: str, token: str | None = None
) -> None:
    with pytest.raises(RequestError) as caught:
        source.fetch(key, token)
    assert caught.value.kind == kind, caught.value.message
    for word in words:
        assert word in caught.value.message
    for secret in ("/tmp", *([token] if token else [])):
        assert secret not in caught.value.message
