"""/tokenize, /startup, /ping and /invocations: LoRAX's routes beside those that generate."""

import asyncio
from typing import Any

import pytest

from pipeline.messages import FailureKind, Prompt, Tokenize
from tests.frontend.fakes import Backend, events, fails, failure, says, silence

pytestmark = pytest.mark.anyio


async def test_the_tokens_of_a_text_have_ids_pieces_and_places() -> None:
    reply = await Backend().post("/tokenize", {"inputs": "hé"})
    assert reply.status_code == 200
    assert reply.json() == [
        {"id": 0, "text": "<s>", "start": 0, "stop": 0},
        {"id": 1, "text": "h", "start": 0, "stop": 1},
        {"id": 2, "text": "é", "start": 1, "stop": 2},
    ]


@pytest.mark.parametrize(
    ("given", "tokens"), [({}, 3), ({"add_special_tokens": None}, 3), ({"extra": 1}, 3)]
)
async def test_special_tokens_come_with_it_unless_they_are_not_wanted(
    given: dict[str, Any], tokens: int
) -> None:
    backend = Backend()
    assert len((await backend.post("/tokenize", {"inputs": "ab", **given})).json()) == tokens
    without = await backend.post("/tokenize", {"inputs": "ab", "add_special_tokens": False})
    assert [one["text"] for one in without.json()] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "status", "error_type"),
    [
        ({"inputs": "123"}, 422, "validation"),  # the worker says so
        ({"inputs": 5}, 422, "validation"),
        ({}, 422, "validation"),
        ({"inputs": "a", "add_special_tokens": "no"}, 422, "validation"),
        ({"inputs": "x" * 200}, 413, "payload_too_large"),
    ],
)
async def test_what_cannot_be_tokenized_is_said_as_everywhere(
    body: Any, status: int, error_type: str
) -> None:
    reply = await Backend(max_body_bytes=100).post("/tokenize", body)
    assert reply.status_code == status
    assert reply.json()["error_type"] == error_type


async def test_what_is_not_json_is_not_tokenized() -> None:
    async with Backend().client() as client:
        json = {"content-type": "application/json"}
        assert (await client.post("/tokenize", content=b"{", headers=json)).status_code == 400
        assert (await client.post("/tokenize", content=b"{}")).status_code == 415
        assert (await client.get("/tokenize")).status_code == 405
    assert (await Backend(ready=False).post("/tokenize", {"inputs": "a"})).status_code == 503


async def test_a_text_takes_a_place_while_it_is_tokenized() -> None:
    backend = Backend(max_concurrent_requests=1)
    worker = backend.downstream.admission.enter()
    assert (await backend.post("/tokenize", {"inputs": "a"})).status_code == 429
    backend.downstream.admission.leave(worker)
    assert (await backend.post("/tokenize", {"inputs": "a"})).status_code == 200
    assert backend.downstream.admission.in_flight == 0


async def test_questions_that_are_open_at_once_get_their_own_answers() -> None:
    backend = Backend()
    replies = await asyncio.gather(
        *(backend.post("/tokenize", {"inputs": text}) for text in ("a", "bcd", "ef"))
    )
    assert [len(reply.json()) - 1 for reply in replies] == [1, 3, 2]
    asked = [message for _, message, _ in backend.sent if isinstance(message, Tokenize)]
    assert len({question.question_id for question in asked}) == 3


async def test_it_has_started_when_a_token_comes_of_a_prompt() -> None:
    backend = Backend(says("I"))
    started = await backend.get("/startup")
    assert (started.status_code, started.content) == (200, b"")
    [prompt] = backend.prompts()
    assert (prompt.max_tokens, prompt.sampling.temperature, prompt.adapter) == (1, 0, None)
    assert backend.downstream.admission.in_flight == 0


async def test_it_has_not_when_none_does() -> None:
    broken = await Backend(fails(failure(FailureKind.INTERNAL, 500, "broken"))).get("/startup")
    assert broken.status_code == 500
    assert broken.json() == {
        "error": "Empty generation: broken",
        "error_type": "failed healthcheck",
    }
    starting = await Backend(says("I"), ready=False).get("/startup")
    assert starting.status_code == 503
    assert starting.json()["error_type"] == "healthcheck"
    full = Backend(silence, max_concurrent_requests=1)
    full.downstream.admission.enter()
    assert (await full.get("/startup")).status_code == 429
    assert not full.prompts()


async def test_sagemakers_route_is_the_root() -> None:
    backend = Backend(says("Hel", "lo"))
    whole = await backend.post("/invocations", {"inputs": "Hi"})
    assert whole.json() == [{"generated_text": "Hello"}]
    streamed = await backend.post("/invocations", {"inputs": "Hi", "stream": True})
    assert [event["token"]["text"] for event in events(streamed.text)] == ["Hel", "lo"]
    assert all(isinstance(prompt, Prompt) for prompt in backend.prompts())
