"""Source `http` over TLS and through proxies."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_loader.remote.origins import origin_of
from adapter_loader.remote.proxies import proxy_of
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.proxy import Proxy, proxy
from tests.adapter_loader.remote_parts import TRIES, assert_refused, http_source, parts, weights_of
from tests.adapter_loader.tls import make_certificate
from tests.adapter_loader.web_server import Served, WebServer, web_server

HOST = "models.invalid"  # no resolver knows it
UNAVAILABLE = FailureKind.ADAPTER_UNAVAILABLE
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(params=["http", "https"])
def server(
    request: pytest.FixtureRequest,
    good_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[WebServer]:
    trusted, context = make_certificate(tmp_path, HOST, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with web_server(context if request.param == "https" else None) as running:
        for name in (CONFIG, WEIGHTS):
            running.files[f"/x/{name}"] = Served((good_adapter / name).read_bytes())
        yield running


@pytest.fixture
def between(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy({HOST: server.port}) as running:
        url = f"http://me:pass%20word@127.0.0.1:{running.port}"
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("https_proxy", url)
        yield running


def url_of(server: WebServer, host: str) -> str:
    return f"{server.url.partition(':')[0]}://{host}:{server.port}"


def test_a_server_with_a_certificate_that_can_be_trusted_is_read(
    server: WebServer, tmp_path: Path
) -> None:
    url = url_of(server, "localhost")
    source = http_source(parts(tmp_path / "cache", url), url)
    assert (
        weights_of(source, AdapterKey("http", f"{url}/x")) == server.files[f"/x/{WEIGHTS}"].content
    )


@pytest.mark.parametrize("server", ["https"], indirect=True)
def test_a_certificate_of_another_name_or_of_nobody_is_not_trusted(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (url_of(server, "127.0.0.1"), url_of(server, "localhost")):
        if "localhost" in url:
            monkeypatch.delenv("SSL_CERT_FILE")
        source = http_source(parts(tmp_path / "cache", url), url)
        key = AdapterKey("http", f"{url}/x")
        assert_refused(source, key, UNAVAILABLE, "certificate", "cannot be trusted")
    assert server.requests == []


def test_where_there_is_a_proxy_it_is_asked_and_looks_up_the_name(
    server: WebServer, between: Proxy, tmp_path: Path
) -> None:
    url = url_of(server, HOST)
    source = http_source(parts(tmp_path / "cache", url), url)
    weights = server.files[f"/x/{WEIGHTS}"]
    weights.cut_at = [1000]
    assert weights_of(source, AdapterKey("http", f"{url}/x"), "mine") == weights.content
    assert f"/x/{WEIGHTS} bytes=1000-" in server.gets()
    assert set(server.tokens) == {"mine"}
    assert set(between.secrets) == {"Basic bWU6cGFzcyB3b3Jk"}
    through_tunnel = f"CONNECT {HOST}:{server.port}"
    assert (through_tunnel in between.requests) == server.url.startswith("https")


def test_a_proxy_that_leads_nowhere_is_said(
    server: WebServer, between: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(server, HOST)
    source = http_source(parts(tmp_path / "cache", url), url)
    key = AdapterKey("http", f"{url}/x")
    between.status = 502
    assert_refused(source, key, UNAVAILABLE, "502")
    assert len(between.requests) == TRIES
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, gone)
        assert_refused(source, key, UNAVAILABLE, "the proxy of this server cannot be reached")
    assert server.requests == []


def test_a_redirect_to_a_name_that_is_not_listed_goes_through_no_proxy_unchecked(
    server: WebServer, between: Proxy, tmp_path: Path
) -> None:
    url = url_of(server, HOST)
    source = http_source(parts(tmp_path / "cache", url), url)
    server.files[f"/x/{WEIGHTS}"].redirect = f"https://localhost:{server.port}/x/{WEIGHTS}"
    key = AdapterKey("http", f"{url}/x")
    assert_refused(source, key, FailureKind.ADAPTER_FORBIDDEN, "not a public address")
    assert not any("localhost" in line for line in between.requests)


def test_the_environment_says_who_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = origin_of("https://a.example.org"), origin_of("http://b.example.com")
    assert proxy_of(here) is None
    monkeypatch.setenv("HTTPS_PROXY", "squid:3128")
    assert proxy_of(here) == ("squid", 3128, {})
    assert proxy_of(there) is None
    monkeypatch.setenv("all_proxy", "http://other")
    assert proxy_of(there) == ("other", 80, {})
    monkeypatch.setenv("no_proxy", "example.org")
    assert proxy_of(here) is None
    monkeypatch.setenv("all_proxy", "socks5://other:1080")
    with pytest.raises(RequestError, match="none of http"):
        proxy_of(there)
