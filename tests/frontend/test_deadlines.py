"""A request's own deadline: it fails then, is told so, and nobody goes on with it."""

from typing import Any

import pytest

from frontend.deadlines import MAX_SECONDS
from pipeline.messages import Pieces
from tests.frontend.fakes import Backend, end, events, piece, says

pytestmark = pytest.mark.anyio

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SOON = 0.02


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": "Hi"}], **changes}


def lorax(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "Hi", "parameters": parameters}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_has_not_begun_in_time_is_a_504_and_cancelled(stream: bool) -> None:
    backend = Backend()
    reply = await backend.post(CHAT, chat(timeout=SOON, stream=stream))
    assert reply.status_code == 504
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
    assert error["message"].endswith(f"its timeout of {SOON} s")
    assert reply.headers["x-should-retry"] == "false"
    assert backend.cancelled() == [backend.prompts()[0].request_id]
    assert backend.downstream.admission.in_flight == 0


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_loraxs_routes_say_it_in_their_words(path: str) -> None:
    reply = await Backend().post(path, lorax(timeout=SOON))
    if path == "/generate_stream":  # whose errors are all events
        assert events(reply.text)[0]["error_type"] == "deadline"
    else:
        assert (reply.status_code, reply.json()["error_type"]) == (504, "deadline")


async def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    backend = Backend(lambda prompt: [Pieces([piece("Hel", prompt.request_id)])])
    told = events((await backend.post(CHAT, chat(timeout=SOON, stream=True))).text)
    assert told[-2]["choices"][0]["delta"]["content"] == "Hel"
    assert told[-1]["error"]["code"] == "deadline_exceeded"
    assert backend.cancelled() == [backend.prompts()[0].request_id]


async def test_the_choices_that_have_not_ended_are_cancelled() -> None:
    def first_alone(prompt: Any) -> list[Pieces]:
        return [Pieces([piece("a", prompt.request_id)], (end(prompt.request_id),))]

    backend = Backend(first_alone)
    reply = await backend.post(CHAT, chat(timeout=SOON, n=3))
    assert reply.status_code == 504
    first = backend.prompts()[0].request_id
    assert backend.cancelled() == [first + 1, first + 2]


async def test_inputs_that_were_not_sent_yet_never_are() -> None:
    backend = Backend(max_tenant_waiting=2)
    body = {"model": "", "input": ["a", "b", "c", "d"], "timeout": SOON}
    reply = await backend.post("/v1/embeddings", body)
    assert reply.status_code == 504
    assert [prompt.text for prompt in backend.prompts()] == ["a", "b"]


async def test_the_first_of_header_and_field_counts() -> None:
    for in_header, in_body in ((SOON, 1000), (1000, SOON)):
        reply = await Backend().post(
            CHAT, chat(timeout=in_body), headers={"X-Request-Timeout": str(in_header)}
        )
        assert reply.status_code == 504


async def test_a_reply_in_time_is_a_reply() -> None:
    backend = Backend(says("Hello"))
    reply = await backend.post(CHAT, chat(timeout=1000), headers={"X-Request-Timeout": "1e3"})
    assert reply.json()["choices"][0]["message"]["content"] == "Hello"
    assert backend.cancelled() == []


@pytest.mark.parametrize("text", ["soon", "", "0", "-1", "nan", "inf", "1e9"])
async def test_a_header_that_is_no_time_is_refused(text: str) -> None:
    backend = Backend(says("Hello"))
    headers = {"X-Request-Timeout": text}
    openai = await backend.post(CHAT, chat(), headers=headers)
    assert openai.status_code == 400
    assert openai.json()["error"]["param"] == "X-Request-Timeout"
    assert (await backend.post("/generate", lorax(), headers=headers)).status_code == 422
    assert backend.prompts() == []


@pytest.mark.parametrize("timeout", [0, -1, MAX_SECONDS + 1, "5"])
async def test_a_field_that_is_no_time_is_refused(timeout: Any) -> None:
    backend = Backend(says("Hello"))
    openai = await backend.post(COMPLETION, {"model": "", "prompt": "Hi", "timeout": timeout})
    assert (openai.status_code, openai.json()["error"]["param"]) == (400, "timeout")
    assert (await backend.post("/generate", lorax(timeout=timeout))).status_code == 422
