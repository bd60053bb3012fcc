"""A reply as it comes: in parts, with one end, and only as long as somebody listens."""

import asyncio
from typing import Any

import pytest

from pipeline.messages import (
    End,
    EndsHeard,
    FailureKind,
    FinishReason,
    Piece,
    Pieces,
    Prefetch,
    Prompt,
)
from tests.frontend.fakes import (
    Backend,
    Connection,
    end,
    events,
    fails,
    failure,
    piece,
    says,
    token,
)

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": "Hi"}], **changes}


def text_of(stream: str) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in events(stream)
        if event != "[DONE]"
        for choice in event["choices"]
    )


async def test_a_whole_reply_is_all_pieces_joined() -> None:
    reply = await Backend(says("Hel", "lo")).post(CHAT, chat())
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "Hello"


async def test_a_stream_is_the_same_text_in_chunks_with_one_end() -> None:
    reply = await Backend(says("Hel", "lo", reason=FinishReason.LENGTH)).post(
        CHAT, chat(stream=True)
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert text_of(reply.text) == "Hello"
    told = events(reply.text)
    assert told[-1] == "[DONE]"
    reasons = [event["choices"][0]["finish_reason"] for event in told[:-1]]
    assert [reason for reason in reasons if reason] == ["length"]


async def test_the_adapters_name_goes_all_the_way() -> None:
    backend = Backend(says("Hello"))
    reply = await backend.post(CHAT, chat(model="org/x"), headers={"Authorization": "Bearer hf_t"})
    assert reply.json()["model"] == "org/x"
    kinds = [(process, type(message)) for process, message, _ in backend.sent]
    assert kinds == [
        ("scheduler", Prefetch),
        ("tokenizer_workers", Prompt),
        ("scheduler", EndsHeard),
    ]
    (prompt,) = backend.prompts()
    assert prompt.adapter is not None
    assert (prompt.adapter.source, prompt.adapter.id) == ("hub", "org/x")
    assert prompt.adapter_token == "hf_t"


async def test_the_base_model_is_called_by_its_id_when_nothing_was_asked_for() -> None:
    reply = await Backend(says("Hello")).post(CHAT, chat())
    assert reply.json()["model"] == "some/base"


async def test_each_part_is_sent_when_it_has_come() -> None:
    backend = Backend()
    connection = Connection(backend, CHAT, chat(stream=True))
    request_id = await started(backend, connection)
    backend.downstream.deliver(Pieces([piece("Hel", request_id)]))
    assert await connection.start() == 200
    assert text_of((await connection.part()).decode()) == "Hel"
    backend.downstream.deliver(Pieces([piece("lo", request_id)]))
    assert text_of((await connection.part()).decode()) == "lo"
    backend.downstream.deliver(Pieces([], (end(request_id),)))
    assert events(await connection.part())[-1] == "[DONE]"
    await connection.task


async def test_parts_that_came_together_are_sent_together() -> None:
    backend = Backend()
    connection = Connection(backend, CHAT, chat(stream=True))
    request_id = await started(backend, connection)
    for text in ("a", "b", "c"):
        backend.downstream.deliver(Pieces([piece(text, request_id)]))
    await connection.start()
    assert text_of((await connection.part()).decode()) == "abc"
    connection.go()
    await connection.task


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_frees_its_place_and_cancels_its_request(stream: bool) -> None:
    backend = Backend()
    connection = Connection(backend, CHAT, chat(stream=stream))
    request_id = await started(backend, connection)
    connection.go()
    await connection.task
    assert backend.cancelled() == [request_id]
    assert backend.downstream.admission.in_flight == 0
    assert connection.parts.empty()


async def test_a_client_that_goes_in_the_middle_of_its_stream_is_sent_no_more() -> None:
    backend = Backend()
    connection = Connection(backend, CHAT, chat(stream=True))
    request_id = await started(backend, connection)
    backend.downstream.deliver(Pieces([piece("Hel", request_id)]))
    await connection.start()
    await connection.part()
    connection.go()
    await connection.task
    backend.downstream.deliver(Pieces([piece("lo", request_id)], (end(request_id),)))
    assert backend.cancelled() == [request_id]
    assert connection.parts.empty()


async def test_a_reply_that_is_complete_is_not_cancelled() -> None:
    backend = Backend(says("Hello"))
    await backend.post(CHAT, chat())
    await backend.post(CHAT, chat(stream=True))
    assert len(backend.prompts()) == 2
    assert backend.cancelled() == []


async def test_a_long_silence_is_broken_by_comments_with_the_status_first() -> None:
    backend = Backend(keep_alive_seconds=0.01)
    connection = Connection(backend, CHAT, chat(stream=True))
    request_id = await started(backend, connection)
    assert await connection.start() == 200
    assert (await connection.part()).endswith(b":\n\n")
    assert await connection.part() == b":\n\n"
    backend.downstream.deliver(Pieces([], (end(request_id, failure=failure()),)))
    while (part := await connection.part()) == b":\n\n":
        pass
    assert events(part)[0]["error"]["code"] == "model_not_found"
    await connection.task


async def test_what_the_drain_cuts_off_is_told_so() -> None:
    backend = Backend()
    streaming = Connection(backend, CHAT, chat(stream=True))
    first = await started(backend, streaming)
    backend.downstream.deliver(Pieces([piece("Hel", first)]))
    await streaming.start()
    await streaming.part()
    waiting = Connection(backend, CHAT, chat())
    second = await started(backend, waiting, number=2)
    await backend.downstream.drain(0)
    assert events(await streaming.part())[-1]["error"]["code"] == "shutting_down"
    assert await waiting.start() == 503
    assert backend.cancelled() == [first, second]


async def test_an_end_with_an_error_and_no_reason_is_still_an_error() -> None:
    backend = Backend(
        lambda prompt: [
            Pieces([], (End(prompt.request_id, FinishReason.ERROR, end().usage),)),
        ]
    )
    reply = await backend.post(CHAT, chat())
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "Incomplete generation"


async def test_loraxs_whole_reply_has_its_headers() -> None:
    backend = Backend(says("Hel", "lo"))
    body = {"inputs": "Hi", "parameters": {"adapter_id": "org/\u2603", "details": True}}
    reply = await backend.post("/generate", body)
    assert reply.json()["generated_text"] == "Hello"
    assert [one["text"] for one in reply.json()["details"]["tokens"]] == ["Hel", "lo"]
    assert reply.headers["x-compute-type"] == "cpu+optimized"
    assert reply.headers["x-generated-tokens"] == "2"
    assert reply.headers["x-adapter-id"] == "org/%E2%98%83"
    assert reply.headers["x-adapter-source"] == "hub"


async def test_loraxs_root_answers_in_a_list_or_in_a_stream() -> None:
    backend = Backend(says("Hel", "lo"))
    assert (await backend.post("/", {"inputs": "Hi"})).json() == [{"generated_text": "Hello"}]
    streamed = await backend.post("/", {"inputs": "Hi", "stream": True})
    told = events(streamed.text)
    assert [event["token"]["text"] for event in told] == ["Hel", "lo"]
    assert told[-1]["generated_text"] == "Hello"
    assert streamed.headers["x-model-id"] == "some/base"
    assert "x-generated-tokens" not in streamed.headers


async def test_an_adapter_that_answered_is_listed_and_one_that_did_not_is_not() -> None:
    backend = Backend(says("Hello"))
    await backend.post(CHAT, chat(model="org/works"))
    backend.answer = fails(failure())
    await backend.post(CHAT, chat(model="org/fails"))
    models = (await backend.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["some/base", "org/works"]


async def test_requests_and_failures_are_counted_by_labels_of_ours() -> None:
    backend = Backend(says("Hello"))
    await backend.post(CHAT, chat(model="org/answers"))
    backend.answer = fails(failure(FailureKind.ADAPTER_FORBIDDEN, 403))
    await backend.post(CHAT, chat(model="org/their-own-label"))
    await backend.get("/their-own-route")
    metrics = (await backend.get("/metrics")).text
    assert 'loradex_http_requests_total{index="0",process="frontend",route="/v1/chat' in metrics
    assert 'status="403"' in metrics
    assert 'kind="adapter_forbidden"' in metrics
    assert 'route="other",status="404"' in metrics
    assert 'adapter="hub:org/answers"' in metrics
    assert "their-own" not in metrics


async def test_tokens_in_pieces_without_details_are_no_events_for_lorax() -> None:
    def answer(prompt: Prompt) -> list[Pieces]:
        request_id = prompt.request_id
        return [
            Pieces([Piece(request_id, "ab")]),
            Pieces([piece("c", request_id, [token(1, "c")])], (end(request_id),)),
        ]

    reply = await Backend(answer).post("/generate_stream", {"inputs": "Hi"})
    told = events(reply.text)
    assert len(told) == 1
    assert told[0]["generated_text"] == "abc"


async def started(backend: Backend, connection: Connection, number: int = 1) -> int:
    """The request id of the number-th prompt, once it has been sent."""
    while len(backend.prompts()) < number:
        assert not connection.task.done()
        await asyncio.sleep(0)  # let it run
    await asyncio.sleep(0)  # let it run
    return backend.prompts()[-1].request_id
