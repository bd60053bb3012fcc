"""Replies have LoRAX's shapes, to the letter."""

from typing import Any

import pytest

from frontend.exchange import HttpReply
from frontend.lorax_replies import Asked, LoraxShape, http_error, refusal
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind, FinishReason
from tests.frontend.fakes import end, events, json_of, piece, streamed, token

TOKEN = {"id": 5, "text": "a", "logprob": -0.5, "special": False, "skipped": False}


def shape(**changes: Any) -> LoraxShape:
    asked: dict[str, Any] = {
        "inputs": "Hi ",
        "model_id": "some/base",
        "compute_type": "cpu+optimized",
        "adapter": None,
        "seed": None,
        "details": False,
        "full_text": False,
        "streamed": False,
        "in_list": False,
        **changes,
    }
    return LoraxShape(Asked(**asked))


def headers_of(reply: HttpReply) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in reply.headers}


def test_a_reply_without_details() -> None:
    assert json_of(shape().whole([piece("a"), piece("b")], end())) == {"generated_text": "ab"}


def test_the_roots_reply_is_in_a_list() -> None:
    assert json_of(shape(in_list=True).whole([piece("a")], end())) == [{"generated_text": "a"}]


def test_a_reply_with_details() -> None:
    reply = shape(details=True, seed=7).whole([piece("a", tokens=[token()])], end())
    assert json_of(reply) == {
        "generated_text": "a",
        "details": {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 2,
            "skipped_tokens": 0,
            "seed": 7,
            "prefill": [],
            "tokens": [TOKEN],
        },
    }


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (FinishReason.LENGTH, "length"),
        (FinishReason.EOS, "eos_token"),
        (FinishReason.STOP, "stop_sequence"),
    ],
)
def test_reasons_have_loraxs_words(reason: FinishReason, word: str) -> None:
    reply = json_of(shape(details=True).whole([], end(reason=reason)))
    assert reply["details"]["finish_reason"] == word


def test_the_full_text_begins_with_the_inputs() -> None:
    whole = shape(full_text=True).whole([piece("a")], end())
    assert json_of(whole)["generated_text"] == "Hi a"
    last = streamed(shape(full_text=True), piece("a", tokens=[token()]), last=end())[-1]
    assert last["generated_text"] == "Hi a"


def test_a_stream_is_an_event_per_token_and_the_last_one_has_it_all() -> None:
    pieces = [
        piece("a", tokens=[token()]),
        piece("", tokens=[token(), token()]),
        piece("bc", tokens=[token(), token(2, "</s>", special=True)]),
    ]
    told = streamed(shape(details=True, streamed=True), *pieces, last=end())
    assert len(told) == 5
    assert told[0] == {"token": TOKEN, "generated_text": None, "details": None}
    assert [event["generated_text"] for event in told] == [None] * 4 + ["abc"]
    assert told[-1] == {
        "token": {"id": 2, "text": "</s>", "logprob": -0.5, "special": True, "skipped": False},
        "generated_text": "abc",
        "details": {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 2,
            "seed": None,
        },
    }


def test_the_details_of_a_stream_are_null_unless_asked_for() -> None:
    told = streamed(shape(streamed=True), piece("a", tokens=[token()]), last=end())
    assert told == [{"token": TOKEN, "generated_text": "a", "details": None}]


def test_an_end_without_a_token_has_an_empty_one() -> None:
    told = events(shape(streamed=True).closing([piece("rest")], end()))
    assert told[0]["token"]["text"] == ""
    assert told[0]["token"]["special"]
    assert told[0]["generated_text"] == "rest"


def test_the_headers_have_the_figures_in_milliseconds() -> None:
    last = end(
        prompt_tokens=3,
        completion_tokens=5,
        queue_seconds=0.25,
        first_token_seconds=0.5,
        total_seconds=1.25,
    )
    headers = headers_of(shape().whole([], last))
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-compute-characters"] == "3"
    assert headers["x-prompt-tokens"] == "3"
    assert headers["x-generated-tokens"] == "5"
    assert headers["x-skipped-tokens"] == "0"
    assert headers["x-total-tokens"] == "8"
    assert headers["x-queue-time"] == "250"
    assert headers["x-inference-time"] == "1000"
    assert headers["x-time-per-token"] == "200"
    assert headers["x-time-to-first-token"] == "250"
    assert headers["x-time-per-output-token"] == "188"
    assert headers["x-total-time"] == headers["x-compute-time"]
    assert headers["x-validation-time"] == "0"
    assert headers["x-model-id"] == "some/base"
    assert "x-adapter-id" not in headers


def test_a_headers_value_is_plain_ascii_whatever_the_adapter_is_called() -> None:
    reply = shape(adapter=AdapterKey("local", "mor\u00e9\u2603 a%")).whole([], end())
    headers = headers_of(reply)
    assert headers["x-adapter-id"] == "mor%C3%A9%E2%98%83 a%25"
    assert headers["x-adapter-source"] == "local"


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "text"),
    [
        (FailureKind.VALIDATION, 422, "validation", "Input validation error: because"),
        (
            FailureKind.TEMPLATE,
            422,
            "template_error",
            "Failed applying chat template to inputs: because",
        ),
        *(
            (kind, 424, "generation", "Request failed during generation: because")
            for kind in (
                FailureKind.ADAPTER_NOT_FOUND,
                FailureKind.ADAPTER_FORBIDDEN,
                FailureKind.ADAPTER_INVALID,
                FailureKind.ADAPTER_UNAVAILABLE,
                FailureKind.INTERNAL,
            )
        ),
        (FailureKind.OVERLOADED, 429, "overloaded", "Model is overloaded"),
        (FailureKind.TIMEOUT, 503, "timeout", "because"),
        (FailureKind.SHUTDOWN, 503, "shutdown", "because"),
    ],
)
def test_every_kind_of_failure_has_its_words(
    kind: FailureKind, status: int, error_type: str, text: str
) -> None:
    error = RequestError(418, kind, "because")
    told = {"error": text, "error_type": error_type}
    reply = refusal(error, streamed=False)
    assert reply.status == status
    assert json_of(reply) == told
    in_stream = shape(streamed=True).refusal(error)
    assert in_stream.status == 200
    assert events(in_stream.body) == events(shape().error_event(error)) == [told]


def test_an_error_of_the_exchange_has_the_shape_too() -> None:
    assert json_of(http_error(405, "no")) == {"error": "no", "error_type": "method_not_allowed"}
