"""The published clients of OpenAI and LoRAX, over a socket, against uvicorn as we run it."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import httpx
import lorax
import openai
import pytest

from frontend.__main__ import Server, listen, server_config
from pipeline.messages import Cancel, FailureKind, FinishReason, Prompt
from tests.frontend.fakes import Backend, fails, failure, says, settings, silence

# lorax-client is written for an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")


class Running:
    """A server in a thread of its own, with everything behind it faked."""

    def __init__(self) -> None:
        listener = listen(settings(port=0))
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.backend: Backend
        self._server: Server
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listener),))
        self._made = threading.Event()
        self._thread.start()
        assert self._made.wait(10)

    async def _serve(self, listener: socket.socket) -> None:
        self.backend = Backend(max_body_bytes=10_000)
        self._server = Server(server_config(self.backend.app, self.backend.settings))
        self._made.set()
        await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def test_openais_client_chats(server: Running, client: openai.OpenAI) -> None:
    server.backend.answer = says("Hel", "lo")
    reply = client.chat.completions.create(
        model="org/x", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=5
    )
    assert reply.choices[0].message.content == "Hello"
    assert reply.model == "org/x"
    assert reply.usage is not None
    assert reply.usage.total_tokens == 5
    assert server.backend.prompts()[-1].adapter_token is None  # EMPTY is none


def test_openais_client_streams_a_chat(server: Running, client: openai.OpenAI) -> None:
    server.backend.answer = says("Hel", "lo", reason=FinishReason.STOP)
    chunks = list(
        client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "Hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


def test_openais_client_completes_and_streams_it(server: Running, client: openai.OpenAI) -> None:
    server.backend.answer = says("Hel", "lo", reason=FinishReason.LENGTH)
    reply = client.completions.create(model="", prompt="Hi", echo=True)
    assert reply.choices[0].text == "HiHello"
    assert reply.choices[0].finish_reason == "length"
    stream = client.completions.create(model="", prompt=[1, 2], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_openais_client_lists_the_models(client: openai.OpenAI) -> None:
    assert next(iter(client.models.list())).id == "some/base"


def test_openais_client_knows_our_errors(server: Running, client: openai.OpenAI) -> None:
    server.backend.answer = fails(failure(message="no adapter `x`"))
    with pytest.raises(openai.NotFoundError, match="no adapter `x`") as missing:
        client.completions.create(model="x", prompt="Hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.completions.create(model="x", prompt="Hi", temperature=3)
    assert wrong.value.param == "temperature"


def test_openais_client_hears_of_an_error_within_a_stream(
    server: Running, client: openai.OpenAI
) -> None:
    server.backend.answer = fails(failure(FailureKind.INTERNAL, 500, "broken"), "Hel")
    stream = client.completions.create(model="", prompt="Hi", stream=True)
    assert next(stream).choices[0].text == "Hel"
    with pytest.raises(openai.APIError, match="broken"):
        next(stream)


def test_loraxs_client_generates(server: Running) -> None:
    server.backend.answer = says("Hel", "lo")
    reply = lorax.Client(server.url).generate("Hi", adapter_id="org/x", max_new_tokens=5)
    assert reply.generated_text == "Hello"
    assert reply.details is not None
    assert [token.text for token in reply.details.tokens] == ["Hel", "lo"]
    assert reply.details.finish_reason == "eos_token"


def test_loraxs_client_streams(server: Running) -> None:
    server.backend.answer = says("Hel", "lo", reason=FinishReason.STOP)
    told = list(lorax.Client(server.url).generate_stream("Hi", max_new_tokens=5))
    assert [one.token.text for one in told] == ["Hel", "lo"]
    assert told[-1].generated_text == "Hello"
    assert told[-1].details is not None
    assert told[-1].details.finish_reason == "stop_sequence"


def test_loraxs_asynchronous_client_generates_and_streams(server: Running) -> None:
    server.backend.answer = says("Hel", "lo")

    async def both() -> tuple[str, list[str]]:
        client = lorax.AsyncClient(server.url)
        whole = await client.generate("Hi")
        return whole.generated_text, [one.token.text async for one in client.generate_stream("Hi")]

    assert asyncio.run(both()) == ("Hello", ["Hel", "lo"])


def test_a_body_over_the_limit_is_answered_and_the_connection_goes_on(server: Running) -> None:
    server.backend.answer = says("Hello")
    with httpx.Client(base_url=server.url) as client:
        large = client.post("/generate", json={"inputs": "x" * 5_000_000})
        assert large.status_code == 413
        assert large.json()["error_type"] == "payload_too_large"
        assert client.post("/generate", json={"inputs": "Hi"}).status_code == 200


def test_a_client_that_hangs_up_is_noticed(server: Running) -> None:
    server.backend.answer = silence
    started, cancelled = server.backend.seen[Prompt], server.backend.seen[Cancel]
    started.clear()
    cancelled.clear()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 16\r\n\r\n{"inputs": "Hi"}'
        )
        assert started.wait(10)
    assert cancelled.wait(10)
