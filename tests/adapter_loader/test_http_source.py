"""Source `http`, against a web server that misbehaves."""

import base64
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter_loader.sources.web import HttpSource
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.remote_parts import (
    MAX_BYTES,
    TRIES,
    Parts,
    assert_refused,
    http_source,
    parts,
    weights_of,
)
from tests.adapter_loader.web_server import Served, WebServer, http_date, web_server

PICKLED = "adapter_model.bin"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


@pytest.fixture
def made(server: WebServer, tmp_path: Path) -> Parts:
    return parts(tmp_path / "cache", server.url)


@pytest.fixture
def source(server: WebServer, made: Parts) -> HttpSource:
    return http_source(made, server.url)


@pytest.fixture
def adapter(server: WebServer, good_adapter: Path) -> Callable[..., AdapterKey]:
    """Serve the good adapter as a folder; its key. Arguments are for the weights."""

    def serve(**weights: object) -> AdapterKey:
        server.files[f"/x/{CONFIG}"] = Served((good_adapter / CONFIG).read_bytes())
        content = (good_adapter / WEIGHTS).read_bytes()
        server.files[f"/x/{WEIGHTS}"] = Served(content, **weights)  # type: ignore[arg-type]
        return AdapterKey("http", f"{server.url}/x")

    return serve


def weights(server: WebServer) -> Served:
    return server.files[f"/x/{WEIGHTS}"]


def test_a_folder_is_downloaded_once_and_asked_about_each_time(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter()
    assert weights_of(source, key) == weights(server).content
    assert sorted(server.gets()) == [f"/x/{CONFIG} -", f"/x/{WEIGHTS} -"]
    server.requests.clear()
    assert weights_of(source, key) == weights(server).content
    assert server.requests == [f"HEAD /x/{WEIGHTS} -", f"HEAD /x/{CONFIG} -"]


@pytest.mark.parametrize("version", ["etag", "date"])
def test_changed_content_is_another_identity(
    version: str, server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(etag="", date=http_date(1)) if version == "date" else adapter()
    before = source.fetch(key, None)
    before.close()
    again = source.fetch(key, None)
    again.close()
    assert again.identity == before.identity
    file = weights(server)
    file.content, file.date = file.content[:-1] + b"\1", http_date(2) if file.date else ""
    assert weights_of(source, key) == file.content
    after = source.fetch(key, None)
    after.close()
    assert after.identity != before.identity


def test_a_server_that_does_not_know_head_is_asked_with_get(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(head=False)
    assert weights_of(source, key) == weights(server).content


@pytest.mark.parametrize("validator", [{}, {"etag": "", "date": http_date(1)}])
def test_a_download_that_was_cut_off_goes_on_where_it_was(
    validator: dict[str, str],
    server: WebServer,
    source: HttpSource,
    made: Parts,
    adapter: Callable[..., AdapterKey],
) -> None:
    key = adapter(cut_at=[1000, 500], **validator)
    assert weights_of(source, key) == weights(server).content
    sent = [line for line in server.gets() if WEIGHTS in line]
    assert sent == [f"/x/{WEIGHTS} {part}" for part in ("-", "bytes=1000-", "bytes=1500-")]
    assert len(made.waits) == 2


def test_what_an_earlier_process_has_left_is_gone_on_with(
    server: WebServer, made: Parts, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(cut_at=[1000] + [0] * (TRIES - 1))
    assert_refused(
        http_source(made, server.url), key, FailureKind.ADAPTER_UNAVAILABLE, "ended early"
    )
    server.requests.clear()
    restarted = http_source(parts(made.folder, server.url), server.url)
    assert weights_of(restarted, key) == weights(server).content
    assert server.gets() == [f"/x/{WEIGHTS} bytes=1000-"]


@pytest.mark.parametrize("how", [{"ranges": False}, {"etag": 'W/"weak"'}])
def test_where_the_rest_cannot_be_had_all_is_sent_again(
    how: dict[str, object],
    server: WebServer,
    source: HttpSource,
    adapter: Callable[..., AdapterKey],
) -> None:
    key = adapter(cut_at=[1000], **how)
    assert weights_of(source, key) == weights(server).content


def test_content_that_changes_between_two_parts_is_never_mixed(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(cut_at=[1000] + [0] * (TRIES - 1))
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE)
    old = weights(server)
    server.files[f"/x/{WEIGHTS}"] = Served(bytes(len(old.content)))
    assert weights_of(source, key) == bytes(len(old.content))


@pytest.mark.parametrize("get_length", [True, False])
def test_a_file_that_is_longer_than_it_was_said_to_be_is_not_used_in_part(
    get_length: bool, server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(surplus=b"more", get_length=get_length)
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, "changed while it was fetched")
    weights(server).surplus = b""
    assert weights_of(source, key) == weights(server).content
    assert server.gets()[-1] == f"/x/{WEIGHTS} -"


def repr_digest(content: bytes) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"Repr-Digest": f"sha-512=:AA==:, sha-256=:{digest}:"}


def test_a_checksum_that_is_told_is_checked(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter()
    weights(server).headers = repr_digest(b"something else")
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, "checksum")
    assert len([line for line in server.gets() if WEIGHTS in line]) == TRIES
    weights(server).headers = repr_digest(weights(server).content)
    assert weights_of(source, key) == weights(server).content


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_with_growing_waits(
    status: int, server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(statuses=[status, status])
    assert weights_of(source, key) == weights(server).content
    weights(server).statuses = [status] * TRIES
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, str(status))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, FailureKind.ADAPTER_FORBIDDEN),
        (403, FailureKind.ADAPTER_FORBIDDEN),
        (418, FailureKind.ADAPTER_UNAVAILABLE),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    status: int,
    kind: FailureKind,
    server: WebServer,
    source: HttpSource,
    adapter: Callable[..., AdapterKey],
) -> None:
    key = adapter(statuses=[status])
    assert_refused(source, key, kind, str(status), "127.0.0.1")
    assert len(server.requests) == 1


def test_a_server_that_stalls_is_given_up(
    server: WebServer, tmp_path: Path, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(stall_at=10)
    impatient = http_source(parts(tmp_path, server.url, stall_seconds=0.05), server.url)
    assert_refused(impatient, key, FailureKind.ADAPTER_UNAVAILABLE, "stalled")


def test_a_fetch_ends_in_time_however_slowly_its_bytes_come(
    server: WebServer, tmp_path: Path, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(stall_at=10)
    hurried = http_source(parts(tmp_path, server.url, seconds=0.3), server.url)
    assert_refused(hurried, key, FailureKind.ADAPTER_UNAVAILABLE)


def test_a_server_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        source = http_source(parts(tmp_path, url), url)
        key = AdapterKey("http", f"{url}/x")
        assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, "127.0.0.1", "be reached")


def test_the_token_goes_to_the_server_and_what_it_reads_is_for_it_alone(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(token="mine")
    mine = AdapterKey("http", key.id, scope="a")
    assert weights_of(source, mine, "mine") == weights(server).content
    theirs = AdapterKey("http", key.id, scope="b")
    assert_refused(source, theirs, FailureKind.ADAPTER_FORBIDDEN, token="theirs")
    assert_refused(source, key, FailureKind.ADAPTER_FORBIDDEN)
    weights(server).token = "revoked"
    assert_refused(source, mine, FailureKind.ADAPTER_FORBIDDEN, token="mine")


def test_other_servers_are_not_asked(server: WebServer, source: HttpSource) -> None:
    for url in ("http://127.0.0.1:1/x", f"https://127.0.0.1:{server.port}/x", "http://moon/x"):
        key = AdapterKey("http", url)
        assert_refused(source, key, FailureKind.ADAPTER_FORBIDDEN, "not one of the hosts")
        assert source.lane(key) == "http"
    assert_refused(source, AdapterKey("http", "ftp://x/y"), FailureKind.ADAPTER_INVALID, "URL")
    assert server.requests == []
    assert source.lane(AdapterKey("http", f"{server.url}/x")) == server.url


def test_a_redirect_leads_only_where_it_may(
    server: WebServer, source: HttpSource, tmp_path: Path, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter()
    content = weights(server).content
    with web_server() as other:
        other.files["/w"] = Served(content)
        weights(server).redirect = f"{other.url}/w"
        assert_refused(source, key, FailureKind.ADAPTER_FORBIDDEN, "without TLS", token="secret")
        weights(server).redirect = f"https://127.0.0.1:{other.port}/w"
        assert_refused(source, key, FailureKind.ADAPTER_FORBIDDEN, "public address")
        assert other.requests == []
        weights(server).redirect = f"{other.url}/w"
        both = http_source(parts(tmp_path, server.url, other.url), server.url)
        assert weights_of(both, key, "secret") == content
        assert set(other.tokens) == {""}, "the token is for the server that was named"
    weights(server).redirect = f"/x/{WEIGHTS}"
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, "more than 5 times")
    weights(server).redirect = "file:///etc/passwd"
    assert_refused(source, key, FailureKind.ADAPTER_UNAVAILABLE, "not a URL")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"length": False, "headers": {"Content-Length": "9" * 5000}}, "Content-Length"),
        ({"length": False}, "Content-Length"),
        ({"etag": ""}, "neither ETag nor Last-Modified"),
    ],
)
def test_a_server_must_say_what_is_needed_to_check_it(
    how: dict[str, object], word: str, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    assert_refused(source, adapter(**how), FailureKind.ADAPTER_INVALID, word)


@pytest.mark.parametrize("within", ["model_weights", "model/model_weights"])
def test_a_run_of_ludwig_is_found_where_ludwig_puts_it(
    within: str, server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    content = weights_of(source, adapter())
    for name in (CONFIG, WEIGHTS):
        server.files[f"/run/{within}/{name}"] = server.files[f"/x/{name}"]
    assert weights_of(source, AdapterKey("http", f"{server.url}/run")) == content


def test_what_is_not_there_is_said(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter()
    config = server.files.pop(f"/x/{CONFIG}")
    assert_refused(source, key, FailureKind.ADAPTER_INVALID, CONFIG)
    del server.files[f"/x/{WEIGHTS}"]
    assert_refused(source, key, FailureKind.ADAPTER_NOT_FOUND, CONFIG)
    server.files[f"/x/{CONFIG}"] = config
    assert_refused(source, key, FailureKind.ADAPTER_INVALID, f"has no {WEIGHTS}")
    server.files[f"/x/{PICKLED}"] = Served(b"\x80")
    assert_refused(source, key, FailureKind.ADAPTER_INVALID, "torch.load")


def test_nothing_too_large_is_downloaded(
    server: WebServer, source: HttpSource, tmp_path: Path, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter()
    little = http_source(parts(tmp_path, server.url, cache_bytes=1000), server.url)
    assert_refused(little, key, FailureKind.ADAPTER_INVALID, "disk_cache_bytes")
    server.files[f"/x/{WEIGHTS}"] = Served(bytes(MAX_BYTES + 1))
    assert_refused(source, key, FailureKind.ADAPTER_INVALID, str(MAX_BYTES + 1))
    assert server.gets() == []


def test_two_who_fetch_the_same_at_the_same_time_both_get_it(
    server: WebServer, source: HttpSource, adapter: Callable[..., AdapterKey]
) -> None:
    key = adapter(stall_at=1000)
    content = weights(server).content
    results: list[bytes] = []

    def fetch() -> None:
        results.append(weights_of(source, key))

    first = threading.Thread(target=fetch)
    first.start()
    assert server.stalled.wait(30)
    weights(server).stall_at = None
    assert weights_of(source, key) == content, "a stalled download holds up nobody"
    server.released.set()
    first.join()
    assert results == [content]
