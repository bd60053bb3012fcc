"""An HTTP proxy on loopback that knows names which nobody else does."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK_BYTES = 65536


@dataclass
class Proxy:
    """requests are "METHOD target"; secrets what they were sent with; status, if set, is answered
    to all."""

    port: int
    ports: dict[str, int]  # name of a host -> its port on loopback
    requests: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    status: int | None = None


@contextmanager
def proxy(ports: dict[str, int]) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            host = self.path.rpartition(":")[0]
            if self._allowed():
                with socket.create_connection(("127.0.0.1", ports[host])) as there:
                    self.send_response(200)
                    self.end_headers()
                    back = threading.Thread(target=_relay, args=(there, self.connection))
                    back.start()
                    _relay(self.connection, there)
                    back.join()
            self.close_connection = True

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if self._allowed():
                with socket.create_connection(("127.0.0.1", ports[parts.hostname or ""])) as there:
                    lines = [f"{self.command} {parts.path} HTTP/1.0", f"Host: {parts.netloc}"]
                    kept = ("Range", "If-Range", "Authorization", "Proxy-Authorization")
                    lines += [f"{one}: {self.headers[one]}" for one in kept if one in self.headers]
                    there.sendall("\r\n".join([*lines, "", ""]).encode())
                    _relay(there, self.connection)

        do_HEAD = do_GET

        def _allowed(self) -> bool:
            made.requests.append(f"{self.command} {self.path}")
            made.secrets.append(self.headers.get("Proxy-Authorization", ""))
            if made.status is not None:
                self.send_error(made.status)
            return made.status is None

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        made = Proxy(listening.server_address[1], ports)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield made
        listening.shutdown()
        thread.join()


def _relay(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
