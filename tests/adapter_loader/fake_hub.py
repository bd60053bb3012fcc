"""A hub on loopback that answers what huggingface_hub asks about files."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Repository:
    """Its files, and who may see it: anybody when `tokens` is None."""

    files: dict[str, bytes]
    tokens: set[str] | None = None
    gated: bool = False  # everybody sees that it is there
    commit: str = "1" * 40


@dataclass
class FakeHub:
    """status, when set, is the answer to everything."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    status: int | None = None
    requests: list[str] = field(default_factory=list)  # "METHOD file", in order

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        repository_id, _, rest = unquote(path).strip("/").partition("/resolve/")
        revision, _, name = rest.rpartition("/")
        if self.status is not None:
            return self.status, {}, b""
        repository = self.repositories.get(repository_id)
        allowed = repository and (repository.tokens is None or token in repository.tokens)
        if repository is None or (not allowed and not repository.gated):
            # as the real one, which does not tell strangers what there is
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b""
        if not allowed:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", repository.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = repository.files.get(name)
        headers = {"X-Repo-Commit": repository.commit}
        if content is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub.requests.append(f"{self.command} {self.path.rpartition('/')[2]}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, headers, body = hub.answer(self.path, token)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
