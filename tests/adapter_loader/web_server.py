"""A web server on loopback that does what it is told, right or wrong."""

import hashlib
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file. statuses are answered first, one per request; then the file."""

    content: bytes
    token: str | None = None
    etag: str | None = None  # None: of the content; empty: none
    date: str = ""  # Last-Modified
    headers: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    cut_at: list[int] = field(default_factory=list)  # each GET breaks off after so many bytes
    stall_at: int | None = None  # each GET stops sending after so many bytes
    ranges: bool = True
    head: bool = True  # knows HEAD
    length: bool = True  # tells Content-Length
    surplus: bytes = b""  # what each GET sends beyond what HEAD has told
    get_length: bool = True  # tells Content-Length to a GET
    redirect: str = ""

    def tag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()}"' if self.etag is None else self.etag


@dataclass
class WebServer:
    """requests are "METHOD path range", in order; tokens what they carried."""

    url: str
    port: int
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)  # ends all stalls
    stalled: threading.Event = field(default_factory=threading.Event)  # set by a stall

    def gets(self) -> list[str]:
        return [line.removeprefix("GET ") for line in self.requests if line.startswith("GET")]


@contextmanager
def web_server(tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '-')}")
            server.tokens.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
            file = server.files.get(self.path)
            status = self._refusal(file)
            if file is None or status:
                self.send_response(status or 404)
                for name, value in (file.headers if file else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif file.redirect:
                self.send_response(302)
                self.send_header("Location", file.redirect)
                self.end_headers()
            else:
                self._send(file)

        do_HEAD = do_GET

        def _refusal(self, file: Served | None) -> int | None:
            if file is None:
                return 404
            if file.statuses:
                return file.statuses.pop(0)
            if self.command == "HEAD" and not file.head:
                return 405
            if file.token is not None and server.tokens[-1] != file.token:
                return 403
            return None

        def _send(self, file: Served) -> None:
            start = self._start(file)
            body = file.content[start:]
            self.send_response(206 if start else 200)
            if start:
                end = len(file.content)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
            for name, value in (("ETag", file.tag()), ("Last-Modified", file.date)):
                if value:
                    self.send_header(name, value)
            for name, value in file.headers.items():
                self.send_header(name, value)
            if self.command == "GET":
                body += file.surplus
            if file.length and (file.get_length or self.command == "HEAD"):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if file.stall_at is not None:
                self.wfile.write(body[: file.stall_at])
                self.wfile.flush()
                server.stalled.set()
                server.released.wait()
            elif file.cut_at:
                self.wfile.write(body[: file.cut_at.pop(0)])
            else:
                self.wfile.write(body)

        def _start(self, file: Served) -> int:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, file.tag(), file.date)
            return int(match[1]) if match and file.ranges and same else 0

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        port = listening.server_address[1]
        if tls is not None:
            listening.socket = tls.wrap_socket(listening.socket, server_side=True)
        scheme = "https" if tls else "http"
        server = WebServer(f"{scheme}://127.0.0.1:{port}", port)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        listening.shutdown()
        thread.join()


def http_date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)
