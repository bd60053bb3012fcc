"""The published clients of LoRAX and of TGI, over a socket, against uvicorn as we run it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import huggingface_hub
import lorax
import pydantic
import pytest
from huggingface_hub.errors import GenerationError, ValidationError
from lorax.types import Details, Response, StreamResponse, Token

from pipeline.messages import FailureKind, FinishReason
from tests.frontend.fakes import fails, failure, says
from tests.frontend.running import Running

# lorax-client is written for an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")


class Token070(Token):  # type: ignore[misc]
    """As version 0.7.0 has it, which is not on the index."""

    skipped: bool


class Details070(Details):  # type: ignore[misc]
    skipped_tokens: int
    tokens: list[Token070]


class Response070(Response):  # type: ignore[misc]
    details: Details070


class StreamResponse070(StreamResponse):  # type: ignore[misc]
    token: Token070


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def client(server: Running) -> lorax.Client:
    return lorax.Client(server.url)


@pytest.fixture
def tgi(server: Running) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(server.url)


# --- lorax-client ---------------------------------------------------------------------------------


def test_loraxs_client_gets_the_best_of_several_and_the_others(
    server: Running, client: lorax.Client
) -> None:
    server.backend.answer = says("Hel", "lo")
    reply = client.generate("Hi", do_sample=True, best_of=3)
    assert reply.generated_text == "Hello"
    assert reply.details is not None
    assert reply.details.best_of_sequences is not None
    assert len(reply.details.best_of_sequences) == 2
    seeds = {reply.details.seed, *(one.seed for one in reply.details.best_of_sequences)}
    assert len(seeds) == 3
    assert all(len(one.tokens) == 2 for one in reply.details.best_of_sequences)


def test_loraxs_client_gets_the_tokens_of_the_prompt(server: Running, client: lorax.Client) -> None:
    server.backend.answer = says("Hel", "lo")
    reply = client.generate("Hi", decoder_input_details=True)
    assert reply.details is not None
    assert [token.text for token in reply.details.prefill] == ["H", "i"]
    assert [token.logprob for token in reply.details.prefill] == [None, -0.5]


def test_loraxs_client_gets_alternatives(server: Running, client: lorax.Client) -> None:
    server.backend.answer = says("a", "b")
    whole = client.generate("Hi", return_k_alternatives=2)
    assert whole.details is not None
    for token in whole.details.tokens:
        assert token.alternative_tokens is not None
        assert [one.text for one in token.alternative_tokens] == [token.text, f"{token.text}1"]

    async def streamed() -> list[Any]:
        stream = lorax.AsyncClient(server.url).generate_stream("Hi", return_k_alternatives=3)
        return [one.token async for one in stream]

    assert [len(one.alternative_tokens) for one in asyncio.run(streamed())] == [3, 3]


def test_loraxs_client_says_all_that_it_can(server: Running, client: lorax.Client) -> None:
    server.backend.answer = says("Hel", "lo", reason=FinishReason.LENGTH)
    reply = client.generate(
        "Hi",
        adapter_id="org/x",
        adapter_source="hub",
        api_token="t",
        do_sample=True,
        max_new_tokens=9,
        ignore_eos_token=True,
        repetition_penalty=1.1,
        return_full_text=True,
        seed=5,
        stop_sequences=["x"],
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        truncate=4,
        typical_p=0.9,
        decoder_input_details=True,
        return_k_alternatives=2,
    )
    assert reply.generated_text == "HiHello"
    assert reply.details is not None
    assert (reply.details.finish_reason, reply.details.seed) == ("length", 5)
    prompt = server.backend.prompts()[-1]
    assert (prompt.truncate, prompt.max_tokens, prompt.stop) == (4, 9, ("x",))
    assert prompt.adapter_token == "t"
    assert prompt.sampling.typical_p == 0.9


def test_loraxs_client_merges(server: Running, client: lorax.Client) -> None:
    server.backend.answer = says("a")
    merge = lorax.MergedAdapters(
        ids=["org/a", "org/b"], weights=[1.0, 2.0], merge_strategy="linear", density=0.5
    )
    assert client.generate("Hi", merged_adapters=merge).generated_text == "a"
    adapter = server.backend.prompts()[-1].adapter
    assert adapter is not None
    assert adapter.merge is not None


def test_loraxs_asynchronous_client_gets_all_of_it_too(server: Running) -> None:
    server.backend.answer = says("Hel", "lo")
    client = lorax.AsyncClient(server.url)
    reply = asyncio.run(
        client.generate("Hi", do_sample=True, best_of=2, decoder_input_details=True)
    )
    assert reply.details is not None
    assert len(reply.details.prefill) == 2
    assert reply.details.best_of_sequences is not None


def test_the_replies_are_those_of_the_newer_client_too(server: Running) -> None:
    server.backend.answer = says("Hel", "lo")
    with httpx.Client() as session:
        asked = {"inputs": "Hi", "parameters": {"details": True}, "stream": False}
        [whole] = session.post(server.url, json=asked).json()
        parsed = Response070(**whole)
        assert parsed.details.skipped_tokens == 0
        assert not any(token.skipped for token in parsed.details.tokens)
        text = session.post(server.url, json={**asked, "stream": True}).text
    datas = [line.removeprefix("data:") for line in text.splitlines() if line]
    told = [pydantic.TypeAdapter(StreamResponse070).validate_json(data) for data in datas]
    assert [one.token.skipped for one in told] == [False, False]


def test_loraxs_client_knows_our_errors(server: Running, client: lorax.Client) -> None:
    server.backend.answer = fails(failure(message="no adapter `x`"))
    with pytest.raises(lorax.errors.GenerationError, match="no adapter `x`"):
        client.generate("Hi", adapter_id="x")
    with pytest.raises(lorax.errors.GenerationError, match="no adapter `x`"):
        list(client.generate_stream("Hi", adapter_id="x"))
    with pytest.raises(lorax.errors.ValidationError, match="stop sequences"):
        client.generate("Hi", stop_sequences=list("abcde"))


def test_loraxs_client_knows_the_others_too(server: Running, client: lorax.Client) -> None:
    server.backend.answer = fails(failure(FailureKind.OVERLOADED, 429))
    with pytest.raises(lorax.errors.OverloadedError):
        client.generate("Hi")
    server.backend.answer = fails(failure(FailureKind.INTERNAL, 500, "broken"), "Hel")
    stream = client.generate_stream("Hi")
    assert next(stream).token.text == "Hel"
    with pytest.raises(lorax.errors.GenerationError, match="broken"):
        next(stream)
    with pytest.raises(lorax.errors.ValidationError, match="must be > 0 and <= 128"):
        client.generate("Hi", do_sample=True, best_of=129)


# --- huggingface_hub, as a client of TGI ----------------------------------------------------------


def test_tgis_client_generates(server: Running, tgi: huggingface_hub.InferenceClient) -> None:
    server.backend.answer = says("Hel", "lo")
    assert tgi.text_generation("Hi", max_new_tokens=5) == "Hello"
    assert tgi.text_generation("Hi", adapter_id="org/x") == "Hello"
    adapter = server.backend.prompts()[-1].adapter
    assert adapter is not None
    assert adapter.id == "org/x"


def test_tgis_client_gets_details(server: Running, tgi: huggingface_hub.InferenceClient) -> None:
    server.backend.answer = says("Hel", "lo", reason=FinishReason.STOP)
    reply = tgi.text_generation(
        "Hi",
        details=True,
        decoder_input_details=True,
        best_of=2,
        do_sample=True,
        top_n_tokens=3,
        stop=["lo"],
        truncate=5,
        watermark=False,
    )
    assert reply.generated_text == "Hello"
    details = reply.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens) == ("stop_sequence", 2)
    assert [token.text for token in details.prefill] == ["H", "i"]
    assert [token.text for token in details.tokens] == ["Hel", "lo"]
    top_tokens: Any = details.top_tokens  # lists in lists stay as JSON has them
    assert [[one["text"] for one in tops] for tops in top_tokens] == [
        ["Hel", "Hel1", "Hel2"],
        ["lo", "lo1", "lo2"],
    ]
    assert details.best_of_sequences is not None
    [other] = details.best_of_sequences
    assert other.generated_text == "Hello"
    assert other.seed != details.seed
    assert other.top_tokens is not None


def test_tgis_client_streams(server: Running, tgi: huggingface_hub.InferenceClient) -> None:
    server.backend.answer = says("Hel", "lo")
    assert list(tgi.text_generation("Hi", stream=True)) == ["Hel", "lo"]
    told = list(tgi.text_generation("Hi", stream=True, details=True, top_n_tokens=2))
    assert [one.index for one in told] == [1, 2]
    assert [one.token.text for one in told] == ["Hel", "lo"]
    assert [len(one.top_tokens or []) for one in told] == [2, 2]
    last = told[-1]
    assert last.generated_text == "Hello"
    assert last.details is not None
    assert last.details.finish_reason == "eos_token"
    assert (last.details.input_length, last.details.generated_tokens) == (3, 2)


def test_tgis_asynchronous_client_generates_and_streams(server: Running) -> None:
    server.backend.answer = says("Hel", "lo")

    async def both() -> tuple[str, list[str]]:
        async with huggingface_hub.AsyncInferenceClient(server.url) as client:
            whole = await client.text_generation("Hi")
            stream = await client.text_generation("Hi", stream=True)
            return whole, [text async for text in stream]

    assert asyncio.run(both()) == ("Hello", ["Hel", "lo"])


def test_tgis_client_knows_our_errors(
    server: Running, tgi: huggingface_hub.InferenceClient
) -> None:
    server.backend.answer = fails(failure(message="no adapter `x`"))
    with pytest.raises(GenerationError, match="no adapter `x`"):
        tgi.text_generation("Hi", adapter_id="x")
    with pytest.raises(GenerationError, match="no adapter `x`"):
        list(tgi.text_generation("Hi", adapter_id="x", stream=True))
    with pytest.raises(ValidationError, match="must be strictly positive"):
        tgi.text_generation("Hi", top_k=0)
    with pytest.raises(ValidationError, match="when streaming"):
        list(tgi.text_generation("Hi", best_of=2, do_sample=True, stream=True))


def test_tgis_client_chats_with_the_base_model_and_with_an_adapter(
    server: Running, tgi: huggingface_hub.InferenceClient
) -> None:
    """Told no model, it sends a word that stands in for one."""
    server.backend.answer = says("Hel", "lo")
    asked: Any = [{"role": "user", "content": "Hi"}]
    reply = tgi.chat_completion(asked, max_tokens=5, logprobs=True, top_logprobs=2)
    assert reply.choices[0].message.content == "Hello"
    assert reply.usage.completion_tokens == 2
    assert reply.choices[0].logprobs is not None
    first = reply.choices[0].logprobs.content[0]
    assert (first.token, len(first.top_logprobs)) == ("Hel", 2)
    assert server.backend.prompts()[-1].adapter is None
    tgi.chat_completion(asked, model="org/x")
    adapter = server.backend.prompts()[-1].adapter
    assert adapter is not None
    assert adapter.id == "org/x"


def test_tgis_client_streams_a_chat(server: Running, tgi: huggingface_hub.InferenceClient) -> None:
    server.backend.answer = says("Hel", "lo")
    chunks = list(
        tgi.chat_completion([{"role": "user", "content": "Hi"}], stream=True, logprobs=True)
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_tgis_client_reads_the_facts(server: Running) -> None:
    tgi = huggingface_hub.InferenceClient(server.url, provider="hf-inference")
    assert tgi.get_endpoint_info()["model_id"] == "some/base"
    assert tgi.health_check()
