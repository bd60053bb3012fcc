"""Bad input gets a clear error with the right status, and disturbs nobody."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually

BODY_LIMIT = 50_000
AT_ONCE = 8


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.make_model(folder / "model", model_folder)
    other = tiny.make_model(folder / "other", model_folder, hidden=32)
    tiny.make_adapters(folder / "root", model, other)
    return serve(
        model_folder=model,
        adapter_root=folder / "root",
        dtype="float32",
        max_body_bytes=BODY_LIMIT,
        max_concurrent_requests=AT_ONCE,
    )


@pytest.fixture
def bystander(server: Server) -> Iterator[None]:
    """Somebody else's stream, which runs through the test and must not notice it."""
    undisturbed = server.token_ids("Once upon a time", "good", max_new_tokens=300)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.token_ids, "Once upon a time", "good", max_new_tokens=300)
        yield
        assert running.result() == undisturbed


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | changes


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "", "prompt": "Hi", "max_tokens": 4} | changes


OPENAI = [
    ("/v1/chat/completions", chat(model="nobody", adapter_source="local"), 404, "nobody"),
    ("/v1/chat/completions", chat(model="foreign"), 422, "q_proj"),
    ("/v1/chat/completions", chat(model="truncated"), 422, tiny.WEIGHTS),
    ("/v1/chat/completions", chat(model="nan"), 422, "finite"),
    ("/v1/chat/completions", chat(model="dora"), 422, "dora"),
    ("/v1/chat/completions", chat(model="garbled"), 422, tiny.WEIGHTS),
    ("/v1/chat/completions", chat(model="weightless"), 422, tiny.WEIGHTS),
    ("/v1/chat/completions", chat(model="../outside", adapter_source="local"), 400, "path"),
    ("/v1/chat/completions", chat(model="link", adapter_source="local"), 404, "link"),
    ("/v1/chat/completions", chat(model="good", adapter_source="moon"), 400, "moon"),
    ("/v1/chat/completions", chat(messages=[]), 400, "messages"),
    ("/v1/chat/completions", chat(messages="Hi"), 400, "messages"),
    ("/v1/chat/completions", chat(temperature=-1), 400, "temperature"),
    ("/v1/chat/completions", chat(top_p=1.5), 400, "top_p"),
    ("/v1/chat/completions", chat(max_tokens=0), 400, "max_tokens"),
    ("/v1/chat/completions", chat(max_tokens="four"), 400, "max_tokens"),
    ("/v1/chat/completions", chat(frequency_penalty=3), 400, "frequency_penalty"),
    ("/v1/chat/completions", chat(logit_bias={"999999": 5}), 400, "logit_bias"),
    ("/v1/chat/completions", chat(n=1000), 400, "choices"),
    ("/v1/chat/completions", {"model": ""}, 400, "messages"),
    ("/v1/completions", completion(prompt=""), 400, "empty"),
    ("/v1/completions", completion(prompt="word " * 1000), 400, str(tiny.CONTEXT)),
    ("/v1/completions", completion(max_tokens=tiny.CONTEXT), 400, str(tiny.CONTEXT)),
    ("/v1/completions", completion(prompt=[10**9]), 400, "vocabulary"),
    ("/v1/completions", completion(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "says"), OPENAI)
def test_openai_routes_say_what_is_wrong(
    server: Server, path: str, body: dict[str, Any], status: int, says: str, stream: bool
) -> None:
    reply = httpx.post(server.url + path, json={**body, "stream": stream}, timeout=60)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert says.lower() in error["message"].lower()
    assert str(server.run_dir.parent) not in error["message"]


LORAX: list[tuple[dict[str, Any], int, str, str]] = [
    ({"inputs": ""}, 422, "validation", "empty"),
    ({"inputs": "Hi", "parameters": {"temperature": -1}}, 422, "validation", "temperature"),
    ({"inputs": "Hi", "parameters": {"top_k": 0}}, 422, "validation", "top_k"),
    ({"inputs": "word " * 1000}, 422, "validation", str(tiny.CONTEXT)),
    ({"inputs": "Hi", "parameters": {"adapter_id": "nobody"}}, 424, "generation", "nobody"),
    ({"inputs": "Hi", "parameters": {"adapter_id": "nan"}}, 424, "generation", "finite"),
    ({"inputs": "Hi", "parameters": {"adapter_id": "foreign"}}, 424, "generation", "q_proj"),
]


@pytest.mark.parametrize(("body", "status", "kind", "says"), LORAX)
def test_lorax_routes_say_what_is_wrong(
    server: Server, body: dict[str, Any], status: int, kind: str, says: str
) -> None:
    body.setdefault("parameters", {}).setdefault("adapter_source", "local")
    reply = httpx.post(server.url + "/generate", json=body, timeout=60)
    assert reply.status_code == status, reply.text
    assert reply.json()["error_type"] == kind
    assert says in reply.json()["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_malformed_json_is_a_400(server: Server, path: str) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(server.url + path, content=b'{"model": ', headers=headers)
    assert reply.status_code == 400
    assert "JSON" in reply.json()["error"]["message"]


def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405(server: Server) -> None:
    assert httpx.get(server.url + "/v1/nothing").status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405


def test_a_body_over_the_limit_is_a_413(server: Server) -> None:
    reply = httpx.post(server.url + "/v1/completions", json=completion(prompt="x" * BODY_LIMIT))
    assert reply.status_code == 413


@pytest.mark.usefixtures("bystander")
def test_nobody_else_notices_bad_adapters_and_bad_requests(server: Server) -> None:
    with ThreadPoolExecutor(AT_ONCE - 2) as threads:
        replies = list(
            threads.map(
                lambda row: httpx.post(server.url + row[0], json=row[1], timeout=60), OPENAI
            )
        )
    assert [reply.status_code for reply in replies] == [row[2] for row in OPENAI]


def test_a_full_queue_is_a_429_and_takes_requests_again_when_it_is_not(server: Server) -> None:
    body = completion(max_tokens=400, stream=True, ignore_eos=True, temperature=0)
    streams = [open_stream(server, body) for _ in range(AT_ONCE)]
    refused = httpx.post(server.url + "/v1/completions", json=completion())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    for stream in streams:
        stream.close()
    assert eventually(
        lambda: httpx.post(server.url + "/v1/completions", json=completion()).status_code == 200
    )


def test_a_client_that_goes_away_frees_what_it_held(server: Server) -> None:
    body = completion(max_tokens=480, stream=True, ignore_eos=True, temperature=0)
    streams = [open_stream(server, body) for _ in range(4)]
    for stream in streams:
        stream.close()
    assert eventually(lambda: server.metric("loradex_requests_running") == 0)
    assert eventually(lambda: server.metric("loradex_requests_in_flight") == 0)
    assert server.token_ids("Hi", max_new_tokens=4)


def test_every_stream_has_exactly_one_end(server: Server) -> None:
    def ends(number: int) -> tuple[int, int]:
        body = completion(
            max_tokens=20 + number, stream=True, model=["", "good", "better"][number % 3]
        )
        lines = httpx.post(server.url + "/v1/completions", json=body, timeout=60).text.split("\n\n")
        events = [line.removeprefix("data: ") for line in lines if line]
        reasons = [
            choice["finish_reason"]
            for event in events
            if event != "[DONE]"
            for choice in json.loads(event)["choices"]
        ]
        return events.count("[DONE]"), sum(reason is not None for reason in reasons)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        assert set(threads.map(ends, range(32))) == {(1, 1)}


def open_stream(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection that has received the first event of its reply."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    received = b""
    while b"data: " not in received:
        got = connection.recv(4096)
        assert got, received
        received += got
    return connection
