"""A hub on loopback that answers what huggingface_hub asks about files."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.adapter_loader.web_server import Served, WebServer


@dataclass
class Repository:
    """Its files, and who may see it: anybody when `tokens` is None."""

    files: dict[str, bytes]
    tokens: set[str] | None = None
    gated: bool = False  # everybody sees that it is there
    commit: str = "1" * 40
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)  # earlier commit -> files

    def move_on(self, commit: str, files: dict[str, bytes]) -> None:
        """A new commit on main."""
        self.history[self.commit] = self.files
        self.commit, self.files = commit, files


@dataclass
class FakeHub:
    """status, when set, is the answer to everything.

    storage  where the weights lie, as those in LFS do; else they come from the hub itself
    """

    endpoint: str
    storage: WebServer | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    status: int | None = None
    retry_after: int | None = None  # told with that status
    wrong_commit: str = ""  # told, once a commit is named
    sizes: bool = True  # says how large what lies in the storage is
    stalls: bool = False  # takes requests and answers none
    released: threading.Event = field(default_factory=threading.Event)  # ends all stalls
    after_first: Callable[[], object] = lambda: None  # called when it knows its first answer
    requests: list[str] = field(default_factory=list)  # "METHOD file", in order

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        repository_id, _, rest = unquote(path).strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if self.status is not None:
            told = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
            return self.status, told, b""
        repository = self.repositories.get(repository_id)
        allowed = repository and (repository.tokens is None or token in repository.tokens)
        if repository is None or (not allowed and not repository.gated):
            # as the real one, which does not tell strangers what there is
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b""
        if not allowed:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        commit = repository.commit if revision == "main" else revision
        files = {**repository.history, repository.commit: repository.files}.get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = files.get(name)
        wrong = self.wrong_commit if revision != "main" else ""
        headers = {"X-Repo-Commit": wrong or commit}
        if content is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        digest = hashlib.sha256(content).hexdigest()
        if self.storage is None or not name.endswith(".safetensors"):
            return 200, {**headers, "ETag": f'"{digest}"'}, content
        path = f"/stored/{digest}"
        self.storage.files.setdefault(path, Served(content, etag='"of the storage"'))
        headers |= {"Location": self.storage.url + path, "X-Linked-Etag": f'"{digest}"'}
        if self.sizes:
            headers["X-Linked-Size"] = str(len(content))
        return 302, headers, b""

    def stored(self, repository_id: str, weights: str) -> Served:
        """The weights of a repository, as they lie in the storage."""
        assert self.storage is not None
        content = self.repositories[repository_id].files[weights]
        self.answer(f"/{repository_id}/resolve/main/{weights}", "")
        return self.storage.files[f"/stored/{hashlib.sha256(content).hexdigest()}"]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            hub.requests.append(f"{self.command} {name}")
            if hub.stalls:
                hub.released.wait()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, headers, body = hub.answer(self.path, token)
            if len(hub.requests) == 1:
                hub.after_first()
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
        hub.released.set()
        server.shutdown()
        thread.join()
