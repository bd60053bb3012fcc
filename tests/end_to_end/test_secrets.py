"""Secrets that a server is given, by requests or by its operator, are found nowhere afterwards."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
import httpx
import pytest
from moto.server import ThreadedMotoServer

from pipeline.arena import arena_path
from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.adapter_loader.web_server import Served, WebServer, web_server
from tests.end_to_end import tiny
from tests.end_to_end.server import Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUCKET = "adapters"


class Secrets(NamedTuple):
    """Each occurs nowhere else in the world."""

    body: str  # api_token
    bearer: str
    wrong: str  # a token that no source knows
    server: str  # HF_TOKEN
    s3_id: str
    s3_key: str
    malformed: str  # sent where no token is understood


class Place(NamedTuple):
    server: Server
    folder: Path  # all that the server may write to, its arena aside
    hub: FakeHub
    web: WebServer


@pytest.fixture(scope="module")
def hidden() -> Secrets:
    return Secrets(*(f"hf_{secrets.token_hex(16)}" for _ in Secrets._fields))


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny.make_adapter(tmp_path_factory.mktemp("good") / "good", model)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model", model_folder)


@pytest.fixture(scope="module")
def s3(files: dict[str, bytes], hidden: Secrets) -> Iterator[str]:
    """The URL of an S3 server that holds the adapter as `good`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client: Any = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=hidden.s3_id,
        aws_secret_access_key=hidden.s3_key,
    )
    client.create_bucket(Bucket=BUCKET)
    for name, content in files.items():
        client.put_object(Bucket=BUCKET, Key=f"good/{name}", Body=content)
    client.close()
    yield url
    server.stop()


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server],
    model: Path,
    files: dict[str, bytes],
    hidden: Secrets,
    s3: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    with ExitStack() as opened:
        hub, web = opened.enter_context(fake_hub()), opened.enter_context(web_server())
        bad = {**files, WEIGHTS: b"not safetensors at all" * 10}
        mine = {hidden.body, hidden.bearer}
        hub.repositories |= {
            "acme/mine": Repository(files, tokens=mine),
            "acme/bad": Repository(bad, tokens=mine),
            "acme/servers": Repository(files, tokens={hidden.server}),
        }
        web.files |= {
            f"/x/{name}": Served(body, token=hidden.bearer) for name, body in files.items()
        }
        version = json.dumps({"adapterPath": "good"}).encode()
        web.files["/v2/repos/good/version/1"] = Served(version, token=hidden.bearer)
        server = serve(
            environment={
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(folder / "hf"),
                "HF_TOKEN": hidden.server,
                "AWS_ACCESS_KEY_ID": hidden.s3_id,
                "AWS_SECRET_ACCESS_KEY": hidden.s3_key,
                "TMPDIR": str(folder),
                "LORADEX_SHARE_HUB_TOKEN": "true",
            },
            model_folder=model,
            adapter_root=tmp_path_factory.mktemp("root"),
            run_dir=folder / "run",
            cache=folder / "cache",
            log_level="debug",
            s3_bucket=BUCKET,
            s3_endpoint=s3,
            pbase_gateway=web.url,
            pbase_bucket=BUCKET,
            http_host=web.url,
            adapter_revalidate_seconds=0,
            source_tries=2,
        )
        yield Place(server, folder, hub, web)


@pytest.fixture(scope="module")
def replies(place: Place, hidden: Secrets) -> list[httpx.Response]:
    with httpx.Client(base_url=place.server.url, timeout=120) as client:
        return talk(client, place, hidden)


def talk(client: httpx.Client, place: Place, hidden: Secrets) -> list[httpx.Response]:
    """Good, bad and failing requests, with every secret on its way."""
    page = f"{place.web.url}/x"

    def ask(
        adapter: str, token: Any = None, bearer: str | None = None, **more: Any
    ) -> httpx.Response:
        parameters = {"adapter_id": adapter, "api_token": token, "max_new_tokens": 3, **more}
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        body = {"inputs": "Hi", "parameters": parameters}
        return client.post("/generate", json=body, headers=headers)

    good = [
        ask("acme/mine", hidden.body),
        ask("acme/mine", hidden.body),  # asks again about what is resident
        ask("acme/mine", None, hidden.bearer),
        ask("acme/servers"),
        ask(page, None, hidden.bearer),
        ask(f"s3://{BUCKET}/good", hidden.body),
        ask("pb://good/1", hidden.bearer),
        ask("", hidden.body, merged_adapters={"ids": ["acme/mine"] * 2, "weights": [1, 1]}),
    ]
    assert [reply.status_code for reply in good] == [200] * len(good), [one.text for one in good]
    bad = [
        *(ask(name, hidden.wrong) for name in ("acme/mine", "no/such", page, "pb://good/1")),
        ask("acme/bad", hidden.body),
        ask(f"s3://{BUCKET}/nothing", hidden.body),
        ask("s3://other/good", hidden.body),
        ask("acme/mine", hidden.malformed + "\n"),
        ask("acme/mine", [hidden.malformed]),
        client.post("/generate", content=f'{{"inputs": "Hi", "parameters": "{hidden.malformed}'),
        client.post("/v1/completions", json={"model": "x", "api_token": {hidden.malformed: 1}}),
        client.get("/v1/nowhere", headers={"Authorization": f"Bearer {hidden.bearer}"}),
    ]
    place.hub.status = 500
    bad.append(ask("acme/mine", hidden.body))
    place.hub.status = None
    assert all(reply.status_code >= 400 for reply in bad), [one.status_code for one in bad]
    stream = {"model": "acme/mine", "prompt": "Hi", "max_tokens": 3, "stream": True}
    bearer = {"Authorization": f"Bearer {hidden.bearer}"}
    told = [
        client.post("/v1/completions", json=stream, headers=bearer),
        *(client.get(path, headers=bearer) for path in ("/v1/models", "/info", "/metrics", "/")),
    ]
    return [*good, *bad, *told]


def assert_hidden(content: bytes, hidden: Secrets, where: str) -> None:
    for kind, secret in hidden._asdict().items():
        assert secret.encode() not in content, f"{kind} is in {where}"


def test_no_reply_has_a_secret(replies: list[httpx.Response], hidden: Secrets) -> None:
    for reply in replies:
        text = f"{reply.headers} {reply.text}"
        assert_hidden(text.encode(), hidden, f"the reply to {reply.request.url}")


def test_no_metric_has_a_secret(
    place: Place, replies: list[httpx.Response], hidden: Secrets
) -> None:
    assert replies
    assert_hidden(httpx.get(f"{place.server.url}/metrics").content, hidden, "/metrics")


def test_no_secret_is_on_disk_or_in_shared_memory(
    place: Place, replies: list[httpx.Response], hidden: Secrets
) -> None:
    assert replies
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert any(path.name == WEIGHTS for path in files)
    for path in (*files, arena_path(place.server.run_dir)):
        assert_hidden(os.fsencode(path) + path.read_bytes(), hidden, str(path))


def test_nothing_that_was_printed_has_a_secret(
    place: Place, replies: list[httpx.Response], hidden: Secrets
) -> None:
    """Comes last: what is said at the end is looked at as well."""
    assert replies
    place.server.stop()
    output = place.server.output()
    assert "event=adapter_staged" in output
    assert "event=adapter_failed" in output
    assert_hidden(output.encode(), hidden, "the output")
