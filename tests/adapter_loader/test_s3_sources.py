"""Sources `s3` and `pbase`, against moto's S3 server and a small gateway."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from adapter_loader.remote.http_client import Limits
from adapter_loader.sources.pbase import PbaseSource
from adapter_loader.sources.s3 import S3Source, S3Store
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.remote_parts import (
    MAX_BYTES,
    TRIES,
    Parts,
    assert_refused,
    parts,
    weights_of,
)
from tests.adapter_loader.web_server import Served, WebServer, web_server

BUCKET = "adapters"
KEY = AdapterKey("s3", f"s3://{BUCKET}/team/x")
Make = Callable[..., S3Source]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-of-the-server")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-server")


@pytest.fixture
def s3(endpoint: str, credentials: None) -> Any:
    session = botocore.session.get_session()
    client: Any = session.create_client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture
def put(s3: Any, good_adapter: Path) -> Callable[..., bytes]:
    """Put the good adapter below a prefix; gives its weights."""

    def put(prefix: str = "team/x", **how: str) -> bytes:
        for name in (CONFIG, WEIGHTS):
            body = (good_adapter / name).read_bytes()
            s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=body, **how)
        return (good_adapter / WEIGHTS).read_bytes()

    return put


def store(endpoint: str, made: Parts) -> S3Store:
    return S3Store(
        endpoint=endpoint, limits=Limits(5, 5), downloads=made.downloads, texts=made.texts
    )


def source(endpoint: str, folder: Path, bucket: str = BUCKET) -> S3Source:
    return S3Source(buckets=[bucket], store=store(endpoint, parts(folder)))


@pytest.mark.parametrize("how", [{}, {"ChecksumAlgorithm": "SHA256"}])
def test_an_adapter_in_a_bucket_is_fetched_and_a_change_is_noticed(
    how: dict[str, str], endpoint: str, s3: Any, put: Callable[..., bytes], tmp_path: Path
) -> None:
    content = put(**how)
    made = source(endpoint, tmp_path)
    assert weights_of(made, KEY, "a-token") == content
    changed = content[:-1] + b"\1"
    s3.put_object(Bucket=BUCKET, Key=f"team/x/{WEIGHTS}", Body=changed)
    assert weights_of(made, KEY) == changed


def test_the_rest_of_a_cut_off_download_comes_from_a_range(
    endpoint: str, put: Callable[..., bytes], tmp_path: Path
) -> None:
    content = put()
    made = source(endpoint, tmp_path)
    weights_of(made, KEY)
    (entry,) = (tmp_path / "entries").iterdir()
    entry.rename(tmp_path / "partial" / entry.name)  # as if it had not been finished
    half = len(content) // 2
    with (tmp_path / "partial" / entry.name / WEIGHTS).open("r+b") as file:
        file.truncate(half)
        file.write(b"kept")  # shows that the first half is not fetched again
    kept = weights_of(made, KEY)
    assert kept == b"kept" + content[4:half] + content[half:]


@pytest.mark.parametrize("within", ["model_weights", "model/model_weights"])
def test_a_run_of_ludwig_is_found_where_ludwig_puts_it(
    within: str, endpoint: str, put: Callable[..., bytes], tmp_path: Path
) -> None:
    content = put(f"run-of-{within}/{within}")
    key = AdapterKey("s3", f"s3://{BUCKET}/run-of-{within}")
    assert weights_of(source(endpoint, tmp_path), key) == content


def test_what_is_not_in_the_bucket_is_said(endpoint: str, s3: Any, tmp_path: Path) -> None:
    made = source(endpoint, tmp_path)
    missing = AdapterKey("s3", f"s3://{BUCKET}/nothing")
    assert_refused(made, missing, FailureKind.ADAPTER_NOT_FOUND, CONFIG)
    s3.put_object(Bucket=BUCKET, Key=f"only/{CONFIG}", Body=b"{}")
    only = AdapterKey("s3", f"s3://{BUCKET}/only")
    assert_refused(made, only, FailureKind.ADAPTER_INVALID, f"has no {WEIGHTS}")
    s3.put_object(Bucket=BUCKET, Key="only/adapter_model.bin", Body=b"\x80")
    assert_refused(made, only, FailureKind.ADAPTER_INVALID, "torch.load")
    s3.put_object(Bucket=BUCKET, Key=f"only/{WEIGHTS}", Body=bytes(MAX_BYTES + 1))
    assert_refused(made, only, FailureKind.ADAPTER_INVALID, str(MAX_BYTES + 1))
    nowhere = source(endpoint, tmp_path, bucket="no-such-bucket")
    key = AdapterKey("s3", "s3://no-such-bucket/x")
    assert_refused(nowhere, key, FailureKind.ADAPTER_NOT_FOUND)


def test_other_buckets_are_not_read(endpoint: str, s3: Any, tmp_path: Path) -> None:
    made = source(endpoint, tmp_path)
    for id in ("s3://other/x", f"s3://{BUCKET}.evil/x", "s3://../x/y"):
        assert_refused(made, AdapterKey("s3", id), FailureKind.ADAPTER_FORBIDDEN, "bucket")
    for id in ("s3://adapters", "s3:///x", "adapters/x"):
        assert_refused(made, AdapterKey("s3", id), FailureKind.ADAPTER_INVALID, "bucket/prefix")


def test_a_store_that_wants_to_be_left_alone_for_a_while_is(tmp_path: Path) -> None:
    made = parts(tmp_path)
    with web_server() as server:
        path = f"/{BUCKET}/team/x/{WEIGHTS}"
        served = Served(b"", statuses=[503] * TRIES, headers={"Retry-After": "7"})
        server.files[path] = served
        patient = S3Source(buckets=[BUCKET], store=store(server.url, made))
        assert_refused(patient, KEY, FailureKind.ADAPTER_UNAVAILABLE, "503")
    assert made.waits == [7, 7]


def test_a_store_that_refuses_or_is_away_is_said(tmp_path: Path) -> None:
    with web_server() as server:
        path = f"/{BUCKET}/team/x/{WEIGHTS}"
        server.files[path] = Served(b"", statuses=[403])
        made = source(server.url, tmp_path)
        assert_refused(made, KEY, FailureKind.ADAPTER_FORBIDDEN, "403")
        server.requests.clear()
        server.files[path].statuses = [503] * TRIES
        assert_refused(made, KEY, FailureKind.ADAPTER_UNAVAILABLE, "503")
        assert len(server.requests) == TRIES
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = source(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
        assert_refused(gone, KEY, FailureKind.ADAPTER_UNAVAILABLE, "cannot be reached")


def test_what_lies_beside_the_weights_for_tokenizers_is_read_and_a_change_is_noticed(
    endpoint: str, s3: Any, put: Callable[..., bytes], tmp_path: Path
) -> None:
    put("team/texts")
    key = AdapterKey("s3", f"s3://{BUCKET}/team/texts")
    made = source(endpoint, tmp_path)
    nothing = made.texts(key, None, "")
    assert nothing is not None
    assert nothing.files == {}
    for content in (b"{{ one }}", b"{{ two }}"):
        s3.put_object(Bucket=BUCKET, Key="team/texts/chat_template.jinja", Body=content)
        found = made.texts(key, None, nothing.version)
        assert found is not None
        assert found.files == {"chat_template.jinja": content}
        assert made.texts(key, None, found.version) is None
    with pytest.raises(RequestError, match="its bucket is not one"):
        made.texts(AdapterKey("s3", "s3://other/x"), None, "")


# --- pbase ---------------------------------------------------------------------------------------

VERSION = "/v2/repos/support/version/3"
ADAPTER = AdapterKey("pbase", "pb://support/3", scope="mine")


@pytest.fixture
def gateway() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


def pbase(gateway: WebServer, endpoint: str, folder: Path) -> PbaseSource:
    made = parts(folder)
    return PbaseSource(
        gateway=gateway.url,
        bucket=BUCKET,
        client=made.client,
        downloads=made.downloads,
        store=store(endpoint, made),
    )


def reply(token: str = "pb_mine", **fields: object) -> Served:
    return Served(json.dumps(fields).encode(), token=token)


def test_the_gateway_says_where_a_version_lies_to_those_who_may_know(
    gateway: WebServer, endpoint: str, put: Callable[..., bytes], tmp_path: Path
) -> None:
    content = put("uploads/7")
    gateway.files[VERSION] = reply(adapterPath="uploads/7/", adapterStatus="completed")
    made = pbase(gateway, endpoint, tmp_path)
    assert weights_of(made, ADAPTER, "pb_mine") == content
    forbidden = FailureKind.ADAPTER_FORBIDDEN
    assert_refused(made, ADAPTER, forbidden, "gateway", "403", token="pb_other")
    assert_refused(made, ADAPTER, forbidden, "needs a token")
    assert "" not in gateway.tokens


def test_the_gateway_says_also_who_may_read_what_lies_beside_the_weights(
    gateway: WebServer, endpoint: str, s3: Any, put: Callable[..., bytes], tmp_path: Path
) -> None:
    put("uploads/8")
    s3.put_object(Bucket=BUCKET, Key="uploads/8/tokenizer_config.json", Body=b"{}")
    gateway.files[VERSION] = reply(adapterPath="uploads/8/", adapterStatus="completed")
    made = pbase(gateway, endpoint, tmp_path)
    found = made.texts(ADAPTER, "pb_mine", "")
    assert found is not None
    assert found.files == {"tokenizer_config.json": b"{}"}
    for token in ("pb_other", None):
        with pytest.raises(RequestError) as caught:
            made.texts(ADAPTER, token, found.version)
        assert caught.value.kind == FailureKind.ADAPTER_FORBIDDEN


def test_what_the_gateway_knows_only_in_the_old_way_is_found(
    gateway: WebServer, endpoint: str, put: Callable[..., bytes], tmp_path: Path
) -> None:
    content = put("u/run/artifacts/model/model_weights")
    old = reply(uuid="u", bestRunID="run")
    gateway.files["/v1/models/version/name/support?version=3"] = old
    gateway.files["/v1/models/version/name/support"] = old
    made = pbase(gateway, endpoint, tmp_path)
    assert weights_of(made, ADAPTER, "pb_mine") == content
    latest = AdapterKey("pbase", "pb://support", scope="mine")
    assert weights_of(made, latest, "pb_mine") == content


@pytest.mark.parametrize(
    ("content", "kind", "word"),
    [
        (b'{"adapterPath": null}', FailureKind.ADAPTER_UNAVAILABLE, "not yet"),
        (b'{"adapterPath": 5}', FailureKind.ADAPTER_UNAVAILABLE, "not understood"),
        (b"<html>", FailureKind.ADAPTER_UNAVAILABLE, "not understood"),
        (b'{"adapterPath": "s3://other/x"}', FailureKind.ADAPTER_UNAVAILABLE, "outside"),
        (b'{"adapterPath": "nothing"}', FailureKind.ADAPTER_NOT_FOUND, CONFIG),
    ],
)
def test_what_the_gateway_says_is_not_believed_blindly(
    content: bytes,
    kind: FailureKind,
    word: str,
    gateway: WebServer,
    endpoint: str,
    s3: Any,
    tmp_path: Path,
) -> None:
    gateway.files[VERSION] = Served(content)
    assert_refused(pbase(gateway, endpoint, tmp_path), ADAPTER, kind, word, token="pb_mine")


def test_a_gateway_that_knows_nothing_of_it_or_fails_is_said(
    gateway: WebServer, endpoint: str, tmp_path: Path
) -> None:
    made = pbase(gateway, endpoint, tmp_path)
    assert_refused(made, ADAPTER, FailureKind.ADAPTER_NOT_FOUND, "no such adapter", token="pb_mine")
    gateway.files[VERSION] = Served(b"", statuses=[500] * TRIES)
    assert_refused(made, ADAPTER, FailureKind.ADAPTER_UNAVAILABLE, "500", token="pb_mine")
    for id in ("pb://a/b/c", "pb://", "pb://../x", "pb://x/..", "support/3"):
        assert_refused(made, AdapterKey("pbase", id), FailureKind.ADAPTER_INVALID, "repo/version")
