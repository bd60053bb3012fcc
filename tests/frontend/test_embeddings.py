"""Requests for embeddings: what they ask for, how they are answered, and how many run at once."""

import asyncio
import json
import struct
from array import array
from base64 import b64decode
from collections.abc import Iterable
from typing import Any

import pytest

from frontend.embeddings import MAX_INPUTS
from pipeline.messages import (
    Cancel,
    End,
    FailureKind,
    FinishReason,
    Pieces,
    Pooling,
    PoolingKind,
    Prompt,
    Usage,
)
from tests.frontend.fakes import BASE, Backend, Connection, end, failure

pytestmark = pytest.mark.anyio

OPENAI, LORAX, EXTRACTION = "/v1/embeddings", "/embed", "/pipeline/feature-extraction"


def vector_of(prompt: Prompt) -> list[float]:
    """Something that tells prompts apart."""
    return [float(len(prompt.text or "")), float(len(prompt.token_ids or b"") // 4), 0.5, -0.25]


def embeds(prompt: Prompt) -> Iterable[Pieces]:
    vector = array("f", vector_of(prompt)).tobytes()
    usage = Usage(prompt_tokens=3, completion_tokens=0)
    yield Pieces([], (End(prompt.request_id, FinishReason.EMBEDDED, usage, embedding=vector),))


def fails_at(text: str, kind: FailureKind = FailureKind.VALIDATION) -> Any:
    def answer(prompt: Prompt) -> Iterable[Pieces]:
        if prompt.text != text:
            return embeds(prompt)
        return [Pieces([], (end(prompt.request_id, failure=failure(kind, 400, "too long")),))]

    return answer


async def test_each_input_has_its_embedding_in_order() -> None:
    backend = Backend(embeds)
    reply = await backend.post(OPENAI, {"model": "", "input": ["a", [1, 2], "bbb"]})
    assert reply.status_code == 200
    assert reply.json() == {
        "object": "list",
        "model": BASE,
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
        "data": [
            {"object": "embedding", "index": index, "embedding": vector_of(prompt)}
            for index, prompt in enumerate(backend.prompts())
        ],
    }
    assert [one.text for one in backend.prompts()] == ["a", None, "bbb"]


@pytest.mark.parametrize(
    ("given", "texts"), [("a", ["a"]), (["a"], ["a"]), ([1, 2], [None]), ([[1], [2]], [None, None])]
)
async def test_an_input_is_a_text_or_token_ids_or_a_list_of_them(
    given: Any, texts: list[str | None]
) -> None:
    backend = Backend(embeds)
    reply = await backend.post(OPENAI, {"model": "", "input": given})
    assert [one.text for one in backend.prompts()] == texts
    assert len(reply.json()["data"]) == len(texts)


async def test_base64_is_of_little_endian_floats() -> None:
    reply = await Backend(embeds).post(
        OPENAI, {"model": "", "input": "ab", "encoding_format": "base64"}
    )
    [one] = reply.json()["data"]
    assert struct.unpack("<4f", b64decode(one["embedding"])) == (2.0, 0.0, 0.5, -0.25)


@pytest.mark.parametrize(
    ("given", "pooling"),
    [
        ({}, Pooling(PoolingKind.MEAN)),
        ({"pooling": "last"}, Pooling(PoolingKind.LAST)),
        ({"normalize": False}, Pooling(PoolingKind.MEAN, normalize=False)),
    ],
)
async def test_the_request_says_how_or_else_the_server(
    given: dict[str, Any], pooling: Pooling
) -> None:
    backend = Backend(embeds, pooling="mean")
    await backend.post(OPENAI, {"model": "", "input": "a", **given})
    await backend.post(LORAX, {"inputs": "a", "parameters": given})
    await backend.post(EXTRACTION, {"inputs": "a", **given})
    assert [one.pooling for one in backend.prompts()] == [pooling] * 3
    assert [one.max_tokens for one in backend.prompts()] == [1] * 3


@pytest.mark.parametrize(
    ("given", "parameter", "sentence"),
    [
        ({"input": ""}, "input", "`input` cannot be empty"),
        ({"input": []}, "input", "`input` cannot be empty"),
        ({"input": ["a", ""]}, "input", "`input` cannot hold empty inputs"),
        ({"input": ["a", []]}, "input", "`input` cannot hold empty inputs"),
        ({"input": ["a", 1]}, "input", "mixes token ids"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "2048 inputs at most. Given: 2049"),
        ({"input": "a", "dimensions": 3}, "dimensions", "`dimensions` must be 4"),
        ({"input": "a", "dimensions": 0}, "dimensions", "Expected `int` >= 1"),
        ({"input": "a", "pooling": "max"}, "pooling", "Invalid enum value 'max'"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "Invalid enum value 'hex'"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
        ({}, "input", "missing required field"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_with_its_name(
    given: dict[str, Any], parameter: str, sentence: str
) -> None:
    backend = Backend(embeds)
    reply = await backend.post(OPENAI, {"model": "", **given})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == parameter
    assert sentence in error["message"]
    assert backend.prompts() == []


async def test_as_many_dimensions_as_there_are_may_be_asked_for() -> None:
    reply = await Backend(embeds).post(OPENAI, {"model": "", "input": "a", "dimensions": 4})
    assert len(reply.json()["data"][0]["embedding"]) == 4


async def test_the_input_that_fails_is_named_and_the_others_are_given_up() -> None:
    backend = Backend(fails_at("b"))
    reply = await backend.post(OPENAI, {"model": "", "input": ["a", "b", "c"]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["message"]) == ("input[1]", "`input[1]`: too long")
    reply = await backend.post(EXTRACTION, {"inputs": ["b", "a"]})
    assert reply.status_code == 422
    assert reply.json()["error"] == "Input validation error: `inputs[0]`: too long"


async def test_what_fails_for_all_inputs_names_none() -> None:
    backend = Backend(fails_at("b", FailureKind.ADAPTER_NOT_FOUND))
    reply = await backend.post(OPENAI, {"model": "o/a", "input": ["b", "b"]})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "too long"
    reply = await Backend(fails_at("b")).post(OPENAI, {"model": "", "input": "b"})
    assert reply.json()["error"]["message"] == "too long"


@pytest.mark.parametrize(("limit", "at_once"), [(0, 64), (3, 3)])
async def test_so_many_inputs_run_at_once_and_the_rest_follow_as_they_end(
    limit: int, at_once: int
) -> None:
    backend = Backend(max_tenant_waiting=limit)
    texts = [str(number) for number in range(70)]
    connection = Connection(backend, OPENAI, {"model": "", "input": texts})
    sent = 0
    while sent < len(texts):
        while len(backend.prompts()) == sent or backend.downstream.admission.in_flight == 0:
            await asyncio.sleep(0)
        running = backend.prompts()[sent:]
        assert len(backend.prompts()) <= sent + at_once
        assert backend.downstream.admission.in_flight == 1
        for prompt in running:
            for message in embeds(prompt):
                backend.downstream.deliver(message)
        sent += len(running)
    assert await connection.start() == 200
    assert [one.text for one in backend.prompts()] == texts
    assert backend.cancelled() == []


async def test_a_client_that_goes_takes_what_runs_with_it() -> None:
    backend = Backend()
    connection = Connection(backend, OPENAI, {"model": "", "input": ["a", "b"]})
    while len(backend.prompts()) < 2:
        await asyncio.sleep(0)
    connection.go()
    await connection.task
    assert backend.cancelled() == [one.request_id for one in backend.prompts()]
    assert all(isinstance(one, Cancel) for _, one, _ in backend.sent[2:])
    assert backend.downstream.admission.in_flight == 0


async def test_what_was_not_sent_is_neither_sent_nor_cancelled_when_one_has_failed() -> None:
    backend = Backend(fails_at("1"), max_tenant_waiting=2)
    reply = await backend.post(OPENAI, {"model": "", "input": [*"0123456789"]})
    assert reply.json()["error"]["param"] == "input[1]"
    assert len(backend.prompts()) < 10
    ended = {one.request_id for one in backend.prompts()}
    assert set(backend.cancelled()) <= ended
    assert backend.downstream.admission.in_flight == 0


async def test_others_have_their_turns_while_a_long_reply_is_sent() -> None:
    """Each embedding is written down as it is sent."""
    backend = Backend(embeds)
    connection = Connection(backend, OPENAI, {"model": "", "input": ["a"] * 5})
    assert await connection.start() == 200
    assert len(json.loads((await connection.part()).partition(b"[")[2])["embedding"]) == 4
    assert connection.parts.empty()
    body = [await connection.part() for _ in range(6)]
    assert [one[:1] for one in body] == [b",", b",", b",", b",", b"]", b""]


async def test_loraxs_route_embeds_one_text() -> None:
    backend = Backend(embeds)
    reply = await backend.post(LORAX, {"inputs": "abc", "parameters": None, "stream": False})
    assert reply.json() == {"embeddings": [3.0, 0.0, 0.5, -0.25]}
    reply = await backend.post(LORAX, {"inputs": ""})
    assert reply.status_code == 422
    assert reply.json()["error"] == "Input validation error: `inputs` cannot be empty"
    reply = await backend.post(LORAX, {"inputs": ["a"]})
    assert reply.status_code == 422


async def test_an_adapter_embeds_whatever_the_route() -> None:
    backend = Backend(embeds)
    await backend.post(OPENAI, {"model": "o/a", "input": "a"})
    await backend.post(LORAX, {"inputs": "a", "parameters": {"adapter_id": "o/a"}})
    await backend.post(EXTRACTION, {"inputs": "a", "adapter_id": "o/a"})
    assert [one.adapter.id for one in backend.prompts() if one.adapter] == ["o/a"] * 3
    both = {"adapter_id": "o/a", "merged_adapters": {"ids": ["o/a"]}}
    reply = await backend.post(LORAX, {"inputs": "a", "parameters": both})
    assert "at most one of" in reply.json()["error"]


async def test_feature_extraction_gives_a_list_for_each_text() -> None:
    reply = await Backend(embeds).post(EXTRACTION, {"inputs": ["a", "bb"]})
    assert reply.json() == [[1.0, 0.0, 0.5, -0.25], [2.0, 0.0, 0.5, -0.25]]
    reply = await Backend(embeds).post(EXTRACTION, {"inputs": "a"})
    assert reply.json() == [[1.0, 0.0, 0.5, -0.25]]


@pytest.mark.parametrize("path", ["/classify", "/classify_batch"])
async def test_a_decoder_does_not_classify(path: str) -> None:
    reply = await Backend(embeds).post(path, {"inputs": "a"})
    assert reply.status_code == 424
    assert reply.json()["error_type"] == "generation"
    assert "Model does not support classification" in reply.json()["error"]
