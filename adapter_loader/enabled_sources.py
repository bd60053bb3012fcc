"""The sources that the settings turn on, and what they share."""

from pathlib import Path

from adapter_loader.bundled_model import cache_root
from adapter_loader.remote.disk_cache import DiskCache
from adapter_loader.remote.downloads import Downloads
from adapter_loader.remote.http_client import HttpClient, Limits
from adapter_loader.remote.last_seen import LastSeen
from adapter_loader.remote.origins import Origin, named_origin, origin_of
from adapter_loader.remote.retries import Retries
from adapter_loader.remote.text_cache import TextCache
from adapter_loader.remote.text_downloads import TextDownloads
from adapter_loader.sources import Source
from adapter_loader.sources.hub import HubSource
from adapter_loader.sources.local import LocalSource
from adapter_loader.sources.web import HttpSource
from pipeline.config import Settings
from pipeline.errors import ConfigError


def enabled_sources(settings: Settings) -> dict[str, Source]:
    """By name. Raises ConfigError for a setting that is not what it should be."""
    if bool(settings.pbase_gateway) != bool(settings.pbase_bucket):
        raise ConfigError("pbase_gateway: it and pbase_bucket are of use only together")
    caches = Path(settings.cache).expanduser() if settings.cache else cache_root()
    retries = Retries(tries=settings.source_tries, seconds=settings.adapter_load_seconds)
    limits = Limits(settings.source_connect_seconds, settings.source_stall_seconds)
    named = _named(settings)
    client = HttpClient(limits=limits, named=named)
    downloads = Downloads(
        client=client,
        cache=DiskCache(folder=caches / "downloads", max_bytes=settings.disk_cache_bytes),
        retries=retries,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    texts = TextDownloads(client=client, downloads=downloads, cache=TextCache(caches / "texts"))
    sources: dict[str, Source] = {
        "local": LocalSource(
            roots=settings.adapter_roots(), max_adapter_bytes=settings.max_adapter_bytes
        ),
        "hub": HubSource(
            downloads=downloads,
            texts=texts,
            max_adapter_bytes=settings.max_adapter_bytes,
            share_token=settings.share_hub_token,
            stall_seconds=settings.source_stall_seconds,
            commits=LastSeen(caches / "hub_commits"),
        ),
    }
    if settings.http_host:
        sources["http"] = HttpSource(named=named, client=client, downloads=downloads, texts=texts)
    if settings.s3_bucket or settings.pbase_gateway:
        sources.update(_stores(settings, limits, client, downloads, texts))
    return sources


def _stores(
    settings: Settings,
    limits: Limits,
    client: HttpClient,
    downloads: Downloads,
    texts: TextDownloads,
) -> dict[str, Source]:
    """Those whose adapters lie in S3."""
    # Deferred: botocore takes a third of a second to import, and most servers have no use for it.
    from adapter_loader.sources.pbase import PbaseSource
    from adapter_loader.sources.s3 import S3Source, S3Store

    sources: dict[str, Source] = {}
    _check_url("s3_endpoint", settings.s3_endpoint)
    _check_url("pbase_gateway", settings.pbase_gateway)
    store = S3Store(endpoint=settings.s3_endpoint, limits=limits, downloads=downloads, texts=texts)
    if settings.s3_bucket:
        sources["s3"] = S3Source(buckets=settings.s3_bucket, store=store)
    if settings.pbase_gateway:
        sources["pbase"] = PbaseSource(
            gateway=settings.pbase_gateway,
            bucket=settings.pbase_bucket,
            client=client,
            downloads=downloads,
            store=store,
        )
    return sources


def _named(settings: Settings) -> set[Origin]:
    named = set()
    for text in settings.http_host:
        try:
            named.add(named_origin(text))
        except ValueError as error:
            raise ConfigError(
                f"http_host: `{text}` is not a host, host:port or http://host:port"
            ) from error
    return named


def _check_url(name: str, url: str) -> None:
    try:
        if url:
            origin_of(url)
    except ValueError as error:
        raise ConfigError(f"{name}: it is not an http or https URL") from error
