"""What a running server shows to others on its machine, and to clients: nothing that is secret."""

import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from frontend.openapi import OPERATIONS
from pipeline.arena import arena_path
from tests.end_to_end import tiny
from tests.end_to_end.processes import processes_of
from tests.end_to_end.server import Server

PRIVATE = 0o077


class Canaries(NamedTuple):
    """Secrets of the operator's, each of which occurs nowhere else in the world."""

    api_key: str
    other_api_key: str
    admin_api_key: str
    HF_TOKEN: str
    AWS_SECRET_ACCESS_KEY: str
    AWS_SESSION_TOKEN: str
    OTEL_EXPORTER_OTLP_HEADERS: str
    https_proxy: str
    token: str  # a client's


class Place(NamedTuple):
    server: Server
    folder: Path  # all that the server may write to, its arena aside
    hidden: Canaries


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    folder = tmp_path_factory.mktemp("place")
    model = tiny.make_model(tmp_path_factory.mktemp("tiny") / "model", model_folder)
    root = tmp_path_factory.mktemp("adapters")
    tiny.make_adapters(root / "root", model, model)
    hidden = Canaries(*(secrets.token_hex(20) for _ in Canaries._fields))
    server = serve(
        environment={
            "TMPDIR": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": hidden.HF_TOKEN,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": hidden.AWS_SECRET_ACCESS_KEY,
            "AWS_SESSION_TOKEN": hidden.AWS_SESSION_TOKEN,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={hidden.OTEL_EXPORTER_OTLP_HEADERS}",
            "https_proxy": f"http://me:{hidden.https_proxy}@127.0.0.1:9",
            "LORADEX_ADMIN_API_KEY": hidden.admin_api_key,
            "LORADEX_ALLOW_ADAPTER_ADMIN": "true",
        },
        api_key=[hidden.api_key, hidden.other_api_key],  # as flags, which `ps` shows at first
        model_folder=model,
        adapter_root=root / "root",
        run_dir=folder / "run",
        cache=folder / "cache",
        s3_bucket="bucket",
        s3_endpoint="http://127.0.0.1:9",
        http_host="models.invalid",
        otlp_endpoint="http://127.0.0.1:9",
        source_tries=1,
        source_connect_seconds=1,
        log_level="debug",
    )
    return Place(server, folder, hidden)


def assert_hidden(content: bytes, hidden: Canaries, where: str) -> None:
    for kind, secret in hidden._asdict().items():
        assert secret.encode() not in content, f"{kind} is in {where}"


def test_no_reply_of_any_route_has_a_secret(place: Place) -> None:
    """To nobody, to a client and to an administrator, for good bodies and for bad ones."""
    hidden = place.hidden
    texts = {"model": "good", "prompt": "Hi", "max_tokens": 1}
    bodies = [
        {**texts, "messages": [{"role": "user", "content": "Hi"}], "inputs": "Hi", "input": "Hi"},
        {"inputs": "Hi", "lora_name": "good", "lora_path": "nan", "adapter_id": "nan"},
        {"inputs": "Hi", "parameters": {"adapter_id": "s3://bucket/x", "api_token": hidden.token}},
        {"inputs": "Hi", "parameters": {"adapter_id": "https://models.invalid/x.zip"}},
        {**texts, "model": "acme/x", "adapter_source": "hub", "api_token": hidden.token},
        {"api_token": {hidden.token: 1}},
    ]
    answered = set()
    with httpx.Client(base_url=place.server.url, timeout=60) as client:
        for key in (None, hidden.api_key, hidden.admin_api_key, hidden.api_key + "x"):
            headers = {"X-Adapter-Token": hidden.token}
            headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
            for operation in OPERATIONS:
                path = operation.path.replace("{model}", "good")
                for body in [None] if operation.body is None else bodies:
                    reply = client.request(operation.method, path, json=body, headers=headers)
                    answered.add(reply.status_code)
                    shown = f"{reply.headers}{reply.text}".encode()
                    assert_hidden(shown, hidden, f"the reply to {operation.path}")
    assert {200, 400, 401, 404, 422} <= answered
    assert 500 not in answered


def test_no_command_line_has_a_secret(place: Place) -> None:
    processes = processes_of(place.server)
    assert len(processes) > 6
    for process in processes:
        line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert_hidden(line, place.hidden, f"the command line of {process.pid}")


def test_the_environment_of_a_process_is_for_its_user_alone(place: Place) -> None:
    for process in processes_of(place.server):
        status = Path(f"/proc/{process.pid}/environ").stat()
        assert stat.S_IMODE(status.st_mode) == 0o400
        assert status.st_uid == os.getuid()


def test_no_process_dumps_a_core(place: Place) -> None:
    for process in processes_of(place.server):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft = re.search(r"Max core file size +(\S+)", limits)
        assert soft is not None
        assert soft[1] in ("0", "1"), process.name()


def test_what_is_written_is_for_the_servers_user_alone(place: Place) -> None:
    written = [place.folder / "run", *(place.folder / "run").rglob("*")]
    assert sum(path.is_socket() for path in written) >= 5
    for path in (path for path in written if not path.is_symlink()):
        assert not path.lstat().st_mode & PRIVATE, path
    assert stat.S_IMODE((place.folder / "run").stat().st_mode) == 0o700
    arena = arena_path(place.server.run_dir).stat()
    assert stat.S_IMODE(arena.st_mode) == 0o600
    assert arena.st_uid == os.getuid()


def test_nothing_listens_beyond_the_http_port(place: Place) -> None:
    tcp: list[tuple[str, int]] = []
    others: list[object] = []
    unix: list[str] = []
    for process in processes_of(place.server):
        for socket in process.net_connections("all"):
            if socket.family == psutil.AF_LINK or not socket.laddr:
                continue
            if isinstance(socket.laddr, str):
                unix.append(socket.laddr)
            elif socket.status == psutil.CONN_LISTEN:
                tcp.append((socket.laddr.ip, socket.laddr.port))
            elif not socket.raddr:
                others.append(socket)
    assert set(tcp) == {("127.0.0.1", place.server.port)}
    assert others == [], "a datagram socket is bound"
    strange = [name for name in unix if not name.startswith(str(place.server.run_dir))]
    assert strange == []


def test_nothing_on_disk_or_in_shared_memory_has_a_secret(place: Place) -> None:
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    for path in (*files, arena_path(place.server.run_dir)):
        assert_hidden(os.fsencode(path) + path.read_bytes(), place.hidden, str(path))


def test_no_line_that_was_printed_has_a_secret(place: Place) -> None:
    """Comes last: what is said at the end is looked at as well."""
    place.server.stop()
    output = place.server.output()
    assert "event=adapter_failed" in output
    assert_hidden(output.encode(), place.hidden, "the output")
