"""Replies as LoRAX writes them: whole, streamed, errors, and the figures in the headers."""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from frontend.calls import Part
from frontend.exchange import CLOSE, JSON, NO_RETRY, RETRY, Headers, HttpReply
from frontend.sse import HEADERS as STREAM_HEADERS
from frontend.sse import event
from pipeline.choices import seed_of
from pipeline.errors import RequestError
from pipeline.messages import (
    AdapterKey,
    Alternative,
    End,
    FailureKind,
    FinishReason,
    Piece,
    TokenDetail,
    Usage,
)

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
}


class _Word(msgspec.Struct, frozen=True):
    """How a kind of failure is told; prefix is what comes before the message."""

    status: int
    error_type: str
    prefix: str = ""
    headers: Headers = ()


GENERATION = _Word(424, "generation", "Request failed during generation: ")
WORDS: dict[str, _Word] = {
    FailureKind.VALIDATION: _Word(422, "validation", "Input validation error: "),
    FailureKind.TEMPLATE: _Word(422, "template_error", "Failed applying chat template to inputs: "),
    FailureKind.GRAMMAR: _Word(422, "validation", "Input validation error: "),
    FailureKind.ADAPTER_NOT_FOUND: GENERATION,
    FailureKind.ADAPTER_FORBIDDEN: GENERATION,
    FailureKind.ADAPTER_INVALID: GENERATION,
    FailureKind.ADAPTER_UNAVAILABLE: GENERATION,
    FailureKind.OVERLOADED: _Word(429, "overloaded", headers=RETRY),
    FailureKind.TIMEOUT: _Word(503, "timeout", headers=RETRY),
    FailureKind.DEADLINE: _Word(504, "deadline", headers=NO_RETRY),
    FailureKind.SHUTDOWN: _Word(503, "shutdown", headers=RETRY + CLOSE),
    FailureKind.INTERNAL: GENERATION,
}
HTTP_ERROR_TYPES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
    422: "validation",
    500: "internal",
    503: "not_ready",
}

encode = msgspec.json.Encoder().encode


def http_error(status: int, message: str, headers: Headers = ()) -> HttpReply:
    """See calls.Dialect."""
    return HttpReply(status, _error(message, HTTP_ERROR_TYPES[status]), JSON + headers)


def unhealthy(why: str, headers: Headers = ()) -> HttpReply:
    return HttpReply(503, _error(f"unhealthy: {why}", "healthcheck"), JSON + headers)


def failed_startup(error: RequestError) -> HttpReply:
    """No token came of a probe."""
    return HttpReply(500, _error(f"Empty generation: {error.message}", "failed healthcheck"))


def not_understood(error: RequestError) -> HttpReply:
    """The reply to a body that is JSON and does not have the shape that it should."""
    sentence = "Failed to deserialize the JSON body into the target type: "
    return http_error(422, sentence + error.message)


def refusal(error: RequestError, *, streamed: bool) -> HttpReply:
    """The reply to a request that failed before anything was sent: 200 when it is a stream."""
    word = WORDS[error.kind]
    if streamed:
        return HttpReply(200, event(_error_of(error)), STREAM_HEADERS + word.headers)
    return HttpReply(word.status, _error_of(error), JSON + word.headers)


def _error_of(error: RequestError) -> bytes:
    word = WORDS[error.kind]
    message = "Model is overloaded" if error.kind == FailureKind.OVERLOADED else error.message
    return _error(word.prefix + message, word.error_type)


def _error(message: str, error_type: str) -> bytes:
    return encode({"error": message, "error_type": error_type})


class Asked(msgspec.Struct, frozen=True):
    """What of a request its reply depends on.

    seed          of the first choice; None when nothing was drawn by lot
    compute_type  what the server runs on
    alternatives  to each token, which are told with it, as LoRAX does
    top_tokens    the same, told beside it, as TGI does
    """

    inputs: str
    model_id: str
    compute_type: str
    adapter: AdapterKey | None
    seed: int | None
    details: bool
    full_text: bool  # the inputs come before the generated text
    streamed: bool
    in_list: bool  # the whole reply is the one element of a list
    alternatives: int = 0
    top_tokens: int = 0


class LoraxShape:
    """The reply to one request. Implements calls.ReplyShape."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._started = time.monotonic()
        self._texts = [asked.inputs] if asked.full_text else []
        self._told = 0  # tokens, in a stream

    def whole(self, pieces: list[Piece], end: End) -> HttpReply:
        return self.reply([Part(0, pieces, end)])

    def reply(self, parts: Sequence[Part], prefill: Sequence[TokenDetail] = ()) -> HttpReply:
        """The reply that is not streamed.

        parts    the choices with their ends, that first which is the reply itself
        prefill  the tokens of the prompt, if they are to be told
        """
        best, *others = parts
        assert best.end is not None
        of_prompt = [_bare(token) for token in prefill]
        reply: dict[str, Any] = {"generated_text": self._text(best)}
        if self._asked.details:
            reply["details"] = {
                **self._details(best.end, best.choice),
                "skipped_tokens": 0,
                "prefill": of_prompt,
                **self._tokens(best),
            }
            if others:
                told = [self._sequence(part, of_prompt) for part in others]
                reply["details"]["best_of_sequences"] = told
        headers = JSON + self.stream_headers() + self._figures(best.end.usage)
        return HttpReply(200, encode([reply] if self._asked.in_list else reply), headers)

    def refusal(self, error: RequestError) -> HttpReply:
        return refusal(error, streamed=self._asked.streamed)

    def stream_headers(self) -> Headers:
        asked = self._asked
        headers: Headers = (
            (b"x-compute-type", asked.compute_type.encode()),
            (b"x-compute-characters", str(len(asked.inputs)).encode()),
            (b"x-model-id", _header_value(asked.model_id)),
        )
        if asked.adapter is None:
            return headers
        parts = asked.adapter.parts
        return (
            *headers,
            (b"x-adapter-id", _header_value(",".join(part.id for part in parts))),
            (b"x-adapter-source", parts[0].source.encode()),
        )

    def opening(self) -> bytes:
        return b""

    def events(self, pieces: list[Piece]) -> bytes:
        """One event per token."""
        self._texts += [piece.text for piece in pieces]
        return b"".join([self._event(token) for piece in pieces for token in piece.tokens])

    def closing(self, pieces: list[Piece], end: End) -> bytes:
        """The event of the last token says what became of it all."""
        self._texts += [piece.text for piece in pieces]
        tokens = [token for piece in pieces for token in piece.tokens] or [NO_TOKEN]
        events = [self._event(token) for token in tokens[:-1]]
        details = self._details(end) if self._asked.details else None
        if details is not None:
            details["input_length"] = end.usage.prompt_tokens  # TGI's name of it
        events.append(self._event(tokens[-1], "".join(self._texts), details))
        return b"".join(events)

    def error_event(self, error: RequestError) -> bytes:
        return event(_error_of(error))

    def _details(self, end: End, choice: int = 0) -> dict[str, Any]:
        return {
            "finish_reason": FINISH_REASONS[end.reason],
            "prompt_tokens": end.usage.prompt_tokens,
            "generated_tokens": end.usage.completion_tokens,
            "seed": self._seed(choice),
        }

    def _sequence(self, part: Part, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        """A choice that is not the best."""
        assert part.end is not None
        return {
            "generated_text": self._text(part),
            "finish_reason": FINISH_REASONS[part.end.reason],
            "generated_tokens": part.end.usage.completion_tokens,
            "seed": self._seed(part.choice),
            "prefill": prefill,
            **self._tokens(part),
        }

    def _seed(self, choice: int) -> int | None:
        return None if self._asked.seed is None else seed_of(self._asked.seed, choice)

    def _text(self, part: Part) -> str:
        before = self._asked.inputs if self._asked.full_text else ""
        return before + "".join([piece.text for piece in part.pieces])

    def _tokens(self, part: Part) -> dict[str, Any]:
        tokens = [token for piece in part.pieces for token in piece.tokens]
        told: dict[str, Any] = {"tokens": [self._token(token) for token in tokens]}
        if self._asked.top_tokens:
            told["top_tokens"] = [self._top_tokens(token) for token in tokens]
        return told

    def _token(self, token: TokenDetail) -> dict[str, Any]:
        told = _with_special(token)
        told["skipped"] = False  # nothing is speculated
        if self._asked.alternatives:
            likeliest = token.alternatives[: self._asked.alternatives]
            told["alternative_tokens"] = [_bare(one) for one in likeliest]
        return told

    def _top_tokens(self, token: TokenDetail) -> list[dict[str, Any]]:
        return [_with_special(one) for one in token.alternatives[: self._asked.top_tokens]]

    def _event(
        self, token: TokenDetail, text: str | None = None, details: dict[str, Any] | None = None
    ) -> bytes:
        """index counts tokens from 1, as TGI does."""
        self._told += 1
        told: dict[str, Any] = {"index": self._told, "token": self._token(token)}
        if self._asked.top_tokens:
            told["top_tokens"] = self._top_tokens(token)
        told["generated_text"] = text
        told["details"] = details
        return event(encode(told))

    def _figures(self, usage: Usage) -> Headers:
        """Counts, and times in milliseconds. Inference begins with the first step."""
        total = time.monotonic() - self._started
        inference = max(0.0, usage.total_seconds - usage.queue_seconds)
        to_first_token = max(0.0, usage.first_token_seconds - usage.queue_seconds)
        generated = usage.completion_tokens
        seconds = {
            b"x-compute-time": total,
            b"x-total-time": total,
            b"x-validation-time": max(0.0, total - usage.total_seconds),
            b"x-queue-time": usage.queue_seconds,
            b"x-inference-time": inference,
            b"x-time-per-token": inference / max(1, generated),
            b"x-time-to-first-token": to_first_token,
            b"x-time-per-output-token": (inference - to_first_token) / max(1, generated - 1),
        }
        counts = {
            b"x-prompt-tokens": usage.prompt_tokens,
            b"x-generated-tokens": generated,
            b"x-skipped-tokens": 0,
            b"x-total-tokens": usage.prompt_tokens + generated,
        }
        counts |= {name: round(value * 1000) for name, value in seconds.items()}
        return tuple((name, str(count).encode()) for name, count in counts.items())


# Stands in the last event when the end comes without a token; its text is certain.
NO_TOKEN = TokenDetail(id=0, text="", logprob=0.0, special=True)


def _bare(token: TokenDetail | Alternative) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob}


def _with_special(token: TokenDetail | Alternative) -> dict[str, Any]:
    return {**_bare(token), "special": token.special}


def _header_value(text: str) -> bytes:
    """Percent-encoded where it is not plain ASCII, which is all that a header may hold."""
    return quote(text, safe="/:@!$&'()*+,;= ").encode()
