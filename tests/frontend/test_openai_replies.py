"""Replies have OpenAI's shapes, to the letter."""

import pytest

from frontend.openai_replies import ChatShape, CompletionShape, http_error, refusal
from frontend.parameters import ParameterError
from pipeline.errors import RequestError
from pipeline.messages import FailureKind, FinishReason
from tests.frontend.fakes import end, events, json_of, piece, streamed

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def test_a_chat_completion() -> None:
    reply = ChatShape(model="m", include_usage=False).whole([piece("Hel"), piece("lo")], end())
    body = json_of(reply)
    assert reply.status == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


def test_a_completion() -> None:
    body = json_of(CompletionShape(model="m", include_usage=False).whole([piece("Hello")], end()))
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "m",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (FinishReason.LENGTH, "length"),
        (FinishReason.EOS, "stop"),
        (FinishReason.STOP, "stop"),
    ],
)
def test_reasons_have_openais_words(reason: FinishReason, word: str) -> None:
    body = json_of(ChatShape(model="m", include_usage=False).whole([], end(reason=reason)))
    assert body["choices"][0]["finish_reason"] == word


def test_the_chunks_of_a_chat() -> None:
    shape = ChatShape(model='mo"del', include_usage=False)
    chunks = streamed(shape, piece("Hel"), piece('"\n\u2028'), last=end())
    assert chunks.pop() == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {'mo"del'}
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {"content": "Hel"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": '"\n\u2028'}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]


def test_the_chunks_of_a_completion() -> None:
    shape = CompletionShape(model="m", include_usage=False)
    chunks = streamed(shape, piece("there"), last=end(reason=FinishReason.LENGTH))
    assert chunks.pop() == "[DONE]"
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "there", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
    ]


def test_usage_is_null_until_a_last_chunk_without_choices() -> None:
    for shape in (
        ChatShape(model="m", include_usage=True),
        CompletionShape(model="m", include_usage=True),
    ):
        chunks = streamed(shape, piece("a"), last=end())
        assert chunks.pop() == "[DONE]"
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == USAGE
        assert all(chunk["usage"] is None for chunk in chunks)


def test_a_piece_without_text_is_no_chunk() -> None:
    shape = ChatShape(model="m", include_usage=False)
    assert shape.events([piece("")]) == b""
    assert len(events(shape.events([piece("a"), piece(""), piece("b")]))) == 2


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "code"),
    [
        (FailureKind.VALIDATION, 400, "invalid_request_error", None),
        (FailureKind.TEMPLATE, 422, "invalid_request_error", "template_error"),
        (FailureKind.ADAPTER_NOT_FOUND, 404, "invalid_request_error", "model_not_found"),
        (FailureKind.ADAPTER_FORBIDDEN, 403, "permission_error", "model_forbidden"),
        (FailureKind.ADAPTER_INVALID, 422, "invalid_request_error", "model_invalid"),
        (FailureKind.ADAPTER_UNAVAILABLE, 503, "server_error", "model_unavailable"),
        (FailureKind.OVERLOADED, 429, "rate_limit_error", "rate_limit_exceeded"),
        (FailureKind.TIMEOUT, 503, "server_error", "timeout"),
        (FailureKind.DEADLINE, 504, "server_error", "deadline_exceeded"),
        (FailureKind.SHUTDOWN, 503, "server_error", "shutting_down"),
        (FailureKind.INTERNAL, 500, "server_error", "internal_error"),
    ],
)
def test_every_kind_of_failure_has_its_words(
    kind: FailureKind, status: int, error_type: str, code: str | None
) -> None:
    error = RequestError(418, kind, "because")
    reply = refusal(error)
    assert reply.status == status
    told = json_of(reply)["error"]
    assert (told["message"], told["type"], told["code"]) == ("because", error_type, code)
    shape = ChatShape(model="m", include_usage=False)
    assert events(shape.error_event(error)) == [{"error": told}]


def test_the_parameter_is_named_in_the_error() -> None:
    assert json_of(refusal(ParameterError("seed", "no")))["error"]["param"] == "seed"
    missing = RequestError(404, FailureKind.ADAPTER_NOT_FOUND, "no")
    assert json_of(refusal(missing))["error"]["param"] == "model"


def test_who_is_turned_away_is_told_when_to_come_again() -> None:
    assert (b"retry-after", b"1") in refusal(
        RequestError(429, FailureKind.OVERLOADED, "full")
    ).headers
    assert (b"connection", b"close") in refusal(
        RequestError(503, FailureKind.SHUTDOWN, "end")
    ).headers


def test_an_error_of_the_exchange_has_the_shape_too() -> None:
    assert json_of(http_error(404, "no")) == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
    }
