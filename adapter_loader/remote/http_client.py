"""One HTTP request at a time, with a limit on everything that could take for ever.

The standard library's client on a socket of our own: it connects to an address that was checked
before, and each read ends when nothing comes for a while or when the whole fetch is out of time.
Nothing is read that the caller does not ask for.

Where there is a proxy, it looks up the names of the origins that somebody vouches for. For others
it is given the address that was checked.
"""

import http.client
import io
import socket
import ssl
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

from adapter_loader.refusals import forbidden, not_found, unavailable
from adapter_loader.remote.origins import Origin, addresses_of, origin_of, public_addresses
from adapter_loader.remote.proxies import Proxy, proxy_of
from adapter_loader.remote.retries import Interrupted

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
MISSING = (404, 410)
FORBIDDEN = (401, 403)
LATER = (408, 425, 429)  # and all from 500 on: worth another try
MAX_RETRY_AFTER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """connect_seconds bounds each address's connection; stall_seconds each wait for bytes."""

    connect_seconds: float
    stall_seconds: float


class Response:
    """The head of a reply; `read` gives its body, as far as it is wanted."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = response.headers

    def read(self, nbytes: int) -> bytes:
        """Up to nbytes, the whole body if it is shorter. Raises Interrupted."""
        with _interruptions():
            return self._response.read(nbytes)

    def read_some(self, nbytes: int) -> bytes:
        """What has come, up to nbytes; nothing at the end. Raises Interrupted."""
        with _interruptions():
            return self._response.read1(nbytes)

    def check(self, whom: str) -> None:
        """Nothing for a success. Raises RequestError or Interrupted, naming `whom`."""
        if 200 <= self.status < 300:
            return
        if self.status in MISSING:
            raise not_found(f"{whom} has no such file (status {self.status})")
        if self.status in FORBIDDEN:
            raise forbidden(f"{whom} does not let it be read (status {self.status})")
        reason = f"{whom} answered with status {self.status}"
        if self.status in LATER or self.status >= 500:
            raise Interrupted(reason, retry_after(self.headers.get("Retry-After")))
        raise unavailable(reason)


class HttpClient:
    """named: origins that may be redirected to wherever they lie; others must be public."""

    def __init__(self, *, limits: Limits, named: Collection[Origin] = ()) -> None:
        self._limits = limits
        self._named = frozenset(named)
        self._tls = ssl.create_default_context()

    @contextmanager
    def open(
        self, method: str, url: str, headers: Mapping[str, str], deadline: float
    ) -> Iterator[Response]:
        """Ask, and go where the answer leads; the connection is closed at the end.

        The caller vouches for the URL's own origin. An Authorization header is not shown to any
        other. deadline is on time.monotonic(). Raises RequestError or Interrupted.
        """
        first = origin = origin_of(url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = headers if origin == first else _without_authorization(headers)
            named = origin == first or origin in self._named
            with self._exchange(method, url, sent, origin, named, deadline) as response:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or location is None:
                    yield response
                    return
            url, origin = _target(url, location)
        raise unavailable(f"it is redirected more than {MAX_REDIRECTS} times")

    @contextmanager
    def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        origin: Origin,
        named: bool,
        deadline: float,
    ) -> Iterator[Response]:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = proxy_of(origin)
        if proxy is None:
            addresses = addresses_of(origin) if named else public_addresses(origin)
            sock = self._connect(origin, addresses, deadline)
        else:
            host = origin.host if named else public_addresses(origin)[0]
            sock = self._connect_through(proxy, origin, host, deadline)
            if origin.scheme == "http":
                target = f"{origin}{target}"
                headers = {**headers, **proxy.headers}
        try:
            with _interruptions():
                connection = http.client.HTTPConnection(origin.host, origin.port)
                limited = _LimitedSocket(sock, self._limits.stall_seconds, deadline)
                connection.sock = cast(socket.socket, limited)
                fixed = {
                    "Connection": "close",
                    "Accept-Encoding": "identity",
                    "User-Agent": "loradex",
                }
                connection.request(method, target, headers={**fixed, **headers})
                response = connection.getresponse()
            yield Response(response)
        finally:
            sock.close()

    def _connect(self, origin: Origin, addresses: list[str], deadline: float) -> socket.socket:
        """To the first address that answers. Raises Interrupted or RequestError."""
        failure = Interrupted(f"the host {origin.host} cannot be reached")
        for address in addresses:
            seconds = min(self._limits.connect_seconds, deadline - time.monotonic())
            if seconds <= 0:
                break
            try:
                sock = socket.create_connection((address, origin.port), seconds)
            except OSError:
                continue
            if origin.scheme == "http":
                return sock
            try:
                return self._with_tls(sock, origin)
            except Interrupted as error:
                failure = error
        raise failure

    def _connect_through(
        self, proxy: Proxy, origin: Origin, host: str, deadline: float
    ) -> socket.socket:
        """To a proxy, and where there is TLS on to the host. Raises Interrupted or RequestError."""
        first = Origin("http", proxy.host, proxy.port)
        try:
            sock = self._connect(first, addresses_of(first), deadline)
        except Interrupted as error:
            raise Interrupted("the proxy of this server cannot be reached") from error
        if origin.scheme == "http":
            return sock
        try:
            self._open_tunnel(sock, proxy, host, origin.port, deadline)
        except BaseException:
            sock.close()
            raise
        return self._with_tls(sock, origin)

    def _open_tunnel(
        self, sock: socket.socket, proxy: Proxy, host: str, port: int, deadline: float
    ) -> None:
        """CONNECT, of RFC 9110, section 9.3.6."""
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
        limited = _LimitedSocket(sock, self._limits.stall_seconds, deadline)
        with _interruptions():
            limited.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
            response = http.client.HTTPResponse(cast(socket.socket, limited), method="CONNECT")
            response.begin()
        if not 200 <= response.status < 300:
            reason = f"the proxy does not lead to {host} (status {response.status})"
            raise Interrupted(reason) if response.status >= 500 else unavailable(reason)

    def _with_tls(self, sock: socket.socket, origin: Origin) -> socket.socket:
        """Raises Interrupted or RequestError; the socket is closed then."""
        try:
            return self._tls.wrap_socket(sock, server_hostname=origin.host)
        except ssl.SSLCertVerificationError as error:
            sock.close()
            raise unavailable(
                f"the certificate of {origin.host} cannot be trusted ({error.verify_message})"
            ) from error
        except OSError as error:
            sock.close()
            raise Interrupted(f"the host {origin.host} does not speak TLS as it should") from error


class _LimitedSocket:
    """What http.client needs of a socket; whoever made the socket closes it."""

    def __init__(self, sock: socket.socket, stall_seconds: float, deadline: float) -> None:
        self._sock = sock
        self._stall_seconds = stall_seconds
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._patience())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Received(self))

    def receive(self, buffer: Any) -> int:
        self._sock.settimeout(self._patience())
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """http.client calls it when a reply ends with its connection, before it has been read."""

    def _patience(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Interrupted("it took too long to fetch")
        return min(self._stall_seconds, left)


class _Received(io.RawIOBase):
    """The bytes that come, as a file."""

    def __init__(self, sock: _LimitedSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.receive(buffer)


@contextmanager
def _interruptions() -> Iterator[None]:
    """What connections and bad servers do, as Interrupted."""
    try:
        yield
    except TimeoutError as error:
        raise Interrupted("the connection stalled") from error
    except http.client.IncompleteRead as error:
        raise Interrupted("the connection ended early") from error
    except http.client.HTTPException as error:
        raise Interrupted("the server does not speak HTTP as it should") from error
    except OSError as error:
        raise Interrupted("the connection broke") from error


def _target(url: str, location: str) -> tuple[str, Origin]:
    target = urljoin(url, location)
    try:
        return target, origin_of(target)
    except ValueError as error:
        raise unavailable("it is redirected to what is not a URL of http or https") from error


def _without_authorization(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def retry_after(value: str | None) -> float:
    """Seconds of a header Retry-After; a date, which it may be too, counts for nothing."""
    if value is None or not value.isascii() or not value.isdigit():
        return 0.0
    return min(float(value), MAX_RETRY_AFTER_SECONDS)
