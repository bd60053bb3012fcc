"""Replies as OpenAI writes them: whole, streamed, and errors."""

import secrets
import time
from typing import Any

import msgspec

from frontend.exchange import CLOSE, JSON, NO_RETRY, RETRY, Headers, HttpReply
from frontend.openai_logprobs import LogprobsShape
from frontend.parameters import ParameterError
from frontend.sse import DONE, event
from frontend.tool_call_replies import call_delta, whole_calls
from pipeline.errors import RequestError
from pipeline.messages import End, FailureKind, FinishReason, Piece, Usage

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
}


class _Word(msgspec.Struct, frozen=True):
    """How a kind of failure is told."""

    status: int
    type: str
    code: str | None
    headers: Headers = ()


WORDS: dict[str, _Word] = {
    FailureKind.VALIDATION: _Word(400, "invalid_request_error", None),
    FailureKind.TEMPLATE: _Word(422, "invalid_request_error", "template_error"),
    FailureKind.GRAMMAR: _Word(422, "invalid_request_error", "invalid_grammar"),
    FailureKind.ADAPTER_NOT_FOUND: _Word(404, "invalid_request_error", "model_not_found"),
    FailureKind.ADAPTER_FORBIDDEN: _Word(403, "permission_error", "model_forbidden"),
    FailureKind.ADAPTER_INVALID: _Word(422, "invalid_request_error", "model_invalid"),
    FailureKind.ADAPTER_UNAVAILABLE: _Word(503, "server_error", "model_unavailable", RETRY),
    FailureKind.OVERLOADED: _Word(429, "rate_limit_error", "rate_limit_exceeded", RETRY),
    FailureKind.TIMEOUT: _Word(503, "server_error", "timeout", RETRY),
    FailureKind.DEADLINE: _Word(504, "server_error", "deadline_exceeded", NO_RETRY),
    FailureKind.SHUTDOWN: _Word(503, "server_error", "shutting_down", RETRY + CLOSE),
    FailureKind.INTERNAL: _Word(500, "server_error", "internal_error"),
}
HTTP_CODES = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
    503: "not_ready",
}

encode = msgspec.json.Encoder().encode


def http_error(status: int, message: str, headers: Headers = ()) -> HttpReply:
    """See calls.Dialect."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = _error(message, kind, parameter=None, code=HTTP_CODES.get(status))
    return HttpReply(status, body, JSON + headers)


def refusal(error: RequestError) -> HttpReply:
    """See calls.Dialect."""
    word = WORDS[error.kind]
    status = error.status if isinstance(error, ParameterError) else word.status
    return HttpReply(status, _error_of(error), JSON + word.headers)


def _error_of(error: RequestError) -> bytes:
    word = WORDS[error.kind]
    parameter = error.parameter if isinstance(error, ParameterError) else None
    if error.kind == FailureKind.ADAPTER_NOT_FOUND:
        parameter = "model"
    return _error(error.message, word.type, parameter=parameter, code=word.code)


def _error(message: str, kind: str, *, parameter: str | None, code: str | None) -> bytes:
    return encode({"error": {"message": message, "type": kind, "param": parameter, "code": code}})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Identity(msgspec.Struct, frozen=True):
    """What all chunks and choices of a reply say of it."""

    token: str = msgspec.field(default_factory=lambda: secrets.token_hex(12))  # of its id
    created: int = msgspec.field(default_factory=lambda: int(time.time()))


class Shape:
    """A choice, as chat completions and completions have it. Implements calls.ReplyShape.

    model          as the client called it
    include_usage  whether the last chunk of a stream counts the tokens
    index          of the choice in its reply
    identity       of the reply, where it has several choices
    logprobs       how those of its tokens are written down; None: they are not wanted
    """

    PREFIX: str  # of the id
    OBJECT: str
    CHUNK_OBJECT: str
    BEFORE_TEXT: bytes  # in a chunk's choice, and what follows the text
    AFTER_TEXT: bytes
    LAST_CHOICE: dict[str, Any]  # of a chunk that carries the finish reason

    def __init__(
        self,
        *,
        model: str,
        include_usage: bool,
        index: int = 0,
        identity: Identity | None = None,
        logprobs: LogprobsShape | None = None,
    ) -> None:
        self._model = model
        self._include_usage = include_usage
        self._index = index
        self._identity = identity or Identity()
        self._logprobs = logprobs
        head = encode(self._object(self.CHUNK_OBJECT))[:-1] + b',"choices":['
        self._before_text = b'data: %b{"index":%d,%b' % (head, index, self.BEFORE_TEXT)
        usage = b',"usage":null' if include_usage else b""
        self._before_logprobs = self.AFTER_TEXT + b',"logprobs":'
        self._after_logprobs = b',"finish_reason":null}]' + usage + b"}\n\n"
        self._after_text = self._before_logprobs + b"null" + self._after_logprobs

    def whole(self, pieces: list[Piece], end: End) -> HttpReply:
        return self.reply([self.choice(pieces, end)], end)

    def choice(self, pieces: list[Piece], end: End) -> dict[str, Any]:
        """It, in a reply that is not streamed."""
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "index": self._index,
            **self._content(pieces),
            "logprobs": None if self._logprobs is None else self._logprobs.of(tokens),
            "finish_reason": self._finish_reason(pieces, end),
        }

    def reply(self, choices: list[dict[str, Any]], end: End) -> HttpReply:
        """The whole reply, of which this choice may be one of several."""
        reply = {**self._object(self.OBJECT), "choices": choices, "usage": _usage(end.usage)}
        return HttpReply(200, encode(reply))

    def refusal(self, error: RequestError) -> HttpReply:
        return refusal(error)

    def stream_headers(self) -> Headers:
        return ()

    def opening(self) -> bytes:
        raise NotImplementedError

    def events(self, pieces: list[Piece]) -> bytes:
        """The bytes around the text are the same for each chunk, and made once."""
        if self._logprobs is not None:
            return b"".join(
                [self._event(piece.text, self._logprobs.of(piece.tokens)) for piece in pieces]
            )
        before, after = self._before_text, self._after_text
        return b"".join([before + encode(piece.text) + after for piece in pieces if piece.text])

    def closing(self, pieces: list[Piece], end: End) -> bytes:
        return self.ending(pieces, end) + self.done(end)

    def ending(self, pieces: list[Piece], end: End) -> bytes:
        """The last of this choice."""
        choice = {
            "index": self._index,
            **self.LAST_CHOICE,
            "logprobs": None,
            "finish_reason": self._finish_reason(pieces, end),
        }
        return self.events(pieces) + self._chunk([choice])

    def done(self, end: End) -> bytes:
        """After the last of all choices; the end is theirs."""
        if not self._include_usage:
            return DONE
        return self._chunk([], usage=_usage(end.usage)) + DONE

    def error_event(self, error: RequestError) -> bytes:
        return event(_error_of(error))

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        """What the choice of a whole reply holds the text in."""
        raise NotImplementedError

    def _finish_reason(self, pieces: list[Piece], end: End) -> str:
        return FINISH_REASONS[end.reason]

    def _event(self, text: str, logprobs: dict[str, Any]) -> bytes:
        before, after = self._before_text, self._before_logprobs
        return before + encode(text) + after + encode(logprobs) + self._after_logprobs

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.PREFIX + self._identity.token,
            "object": kind,
            "created": self._identity.created,
            "model": self._model,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self._object(self.CHUNK_OBJECT), "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return event(encode(chunk))


class ChatShape(Shape):
    """A chat completion."""

    PREFIX = "chatcmpl-"
    OBJECT = "chat.completion"
    CHUNK_OBJECT = "chat.completion.chunk"
    BEFORE_TEXT = b'"delta":{"content":'
    AFTER_TEXT = b"}"
    LAST_CHOICE = {"delta": {}}

    def __init__(
        self,
        *,
        model: str,
        include_usage: bool,
        index: int = 0,
        identity: Identity | None = None,
        logprobs: LogprobsShape | None = None,
        may_call: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            include_usage=include_usage,
            index=index,
            identity=identity,
            logprobs=logprobs,
        )
        self._may_call = may_call
        self._has_called = False

    def opening(self) -> bytes:
        content = None if self._may_call else ""
        return self._delta({"role": "assistant", "content": content, "refusal": None})

    def events(self, pieces: list[Piece]) -> bytes:
        if not self._may_call:
            return super().events(pieces)
        events = b""
        for piece in pieces:
            events += super().events([piece]) if piece.text else self._tokens_alone(piece)
            self._has_called = self._has_called or bool(piece.tool_calls)
            events += b"".join([self._delta(call_delta(part)) for part in piece.tool_calls])
        return events

    def _tokens_alone(self, piece: Piece) -> bytes:
        """What is told of tokens that are none of the content: there may be none of that."""
        logprobs = None if self._logprobs is None else self._logprobs.of(piece.tokens)
        return self._delta({}, logprobs) if logprobs is not None and logprobs["content"] else b""

    def _delta(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._chunk([choice])

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join([piece.text for piece in pieces])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := whole_calls(pieces):
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message}

    def _finish_reason(self, pieces: list[Piece], end: End) -> str:
        """A reply that was cut off may lack the rest of a call."""
        called = self._has_called or any(piece.tool_calls for piece in pieces)
        if called and end.reason is not FinishReason.LENGTH:
            return "tool_calls"
        return super()._finish_reason(pieces, end)


class CompletionShape(Shape):
    """A completion."""

    PREFIX = "cmpl-"
    OBJECT = CHUNK_OBJECT = "text_completion"
    BEFORE_TEXT = b'"text":'
    AFTER_TEXT = b""
    LAST_CHOICE = {"text": ""}

    def opening(self) -> bytes:
        return b""

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        return {"text": "".join([piece.text for piece in pieces])}
