"""Replies have LoRAX's shapes, to the letter."""

from typing import Any

import pytest

from frontend.calls import Part
from frontend.exchange import HttpReply
from frontend.lorax_choices import LoraxChoices
from frontend.lorax_replies import Asked, LoraxShape, http_error, refusal
from pipeline.choices import seed_of
from pipeline.errors import RequestError
from pipeline.messages import (
    AdapterKey,
    Alternative,
    FailureKind,
    FinishReason,
    PromptDetails,
    TokenDetail,
)
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
    assert told[0] == {"index": 1, "token": TOKEN, "generated_text": None, "details": None}
    assert [event["index"] for event in told] == [1, 2, 3, 4, 5]
    assert [event["generated_text"] for event in told] == [None] * 4 + ["abc"]
    assert told[-1] == {
        "index": 5,
        "token": {"id": 2, "text": "</s>", "logprob": -0.5, "special": True, "skipped": False},
        "generated_text": "abc",
        "details": {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 2,
            "seed": None,
            "input_length": 3,
        },
    }


def test_the_details_of_a_stream_are_null_unless_asked_for() -> None:
    told = streamed(shape(streamed=True), piece("a", tokens=[token()]), last=end())
    assert told == [{"index": 1, "token": TOKEN, "generated_text": "a", "details": None}]


def test_an_end_without_a_token_has_an_empty_one() -> None:
    told = events(shape(streamed=True).closing([piece("rest")], end()))
    assert told[0]["token"]["text"] == ""
    assert told[0]["token"]["special"]
    assert told[0]["generated_text"] == "rest"


LIKELY = TokenDetail(
    5,
    "a",
    -0.5,
    False,
    (
        Alternative(5, "a", -0.5),
        Alternative(9, "b", -1.5),
        Alternative(2, "<e>", -3.0, special=True),
    ),
)


def test_alternatives_are_within_the_token_and_tgis_are_beside_it() -> None:
    pieces = [piece("a", tokens=[LIKELY])]
    alternatives = [
        {"id": 5, "text": "a", "logprob": -0.5},
        {"id": 9, "text": "b", "logprob": -1.5},
    ]
    top = [
        {"id": 5, "text": "a", "logprob": -0.5, "special": False},
        {"id": 9, "text": "b", "logprob": -1.5, "special": False},
        {"id": 2, "text": "<e>", "logprob": -3.0, "special": True},
    ]
    loraxs = json_of(shape(details=True, alternatives=2).whole(pieces, end()))["details"]
    assert loraxs["tokens"] == [{**TOKEN, "alternative_tokens": alternatives}]
    assert "top_tokens" not in loraxs
    tgis = json_of(shape(details=True, top_tokens=3).whole(pieces, end()))["details"]
    assert tgis["tokens"] == [TOKEN]
    assert tgis["top_tokens"] == [top]
    [both] = streamed(shape(alternatives=2, top_tokens=3), *pieces, last=end())
    assert both["token"]["alternative_tokens"] == alternatives
    assert both["top_tokens"] == top


def choice(at: int, text: str, *logprobs: float) -> Part:
    tokens = [TokenDetail(at, text, logprob, False) for logprob in logprobs]
    last = end(at, prompt_tokens=3, completion_tokens=len(logprobs))
    return Part(at, [piece(text, at, tokens)], last, PROMPT)


PROMPT = PromptDetails(
    0, "Hi ", (TokenDetail(7, "Hi", None, False), TokenDetail(8, " ", -2.0, False))
)
PREFILL = [
    {"id": 7, "text": "Hi", "logprob": None},
    {"id": 8, "text": " ", "logprob": -2.0},
]


def test_the_best_is_the_likeliest_by_token_and_the_others_come_with_it() -> None:
    """A longer reply is not worse for being longer."""
    parts = [choice(0, "bad", -3.0), choice(1, "long", -0.5, -0.5, -0.5), choice(2, "good", -1.0)]
    reply = LoraxChoices(shape(details=True, seed=7, full_text=True)).whole(parts)
    [best] = [json_of(reply)]
    assert best["generated_text"] == "Hi long"
    assert best["details"]["generated_tokens"] == 3
    assert best["details"]["seed"] == seed_of(7, 1)
    assert best["details"]["prefill"] == PREFILL
    others = best["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["Hi good", "Hi bad"]
    assert others[1] == {
        "generated_text": "Hi bad",
        "finish_reason": "eos_token",
        "generated_tokens": 1,
        "seed": 7,
        "prefill": PREFILL,
        "tokens": [{"id": 0, "text": "bad", "logprob": -3.0, "special": False, "skipped": False}],
    }
    assert headers_of(reply)["x-generated-tokens"] == "3"


def test_a_prompt_is_told_of_without_other_choices() -> None:
    reply = LoraxChoices(shape(details=True)).whole([choice(0, "a", -0.5)])
    details = json_of(reply)["details"]
    assert details["prefill"] == PREFILL
    assert "best_of_sequences" not in details


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
        (FailureKind.DEADLINE, 504, "deadline", "because"),
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
