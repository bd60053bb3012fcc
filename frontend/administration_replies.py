"""What administrators are answered, in the words of vLLM and of SGLang.

Controllers look at status, text and the words in errors, so these are kept.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from frontend.adapters import written
from frontend.exchange import JSON, RETRY, HttpReply
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind

TEXT = ((b"content-type", b"text/plain; charset=utf-8"),)
CHALLENGE = ((b"www-authenticate", b"Bearer"),)
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    503: "ServiceUnavailableError",
}

encode = msgspec.json.Encoder().encode


class Replies(Protocol):
    """How one family of routes answers."""

    def done(self, sentence: str) -> HttpReply: ...

    def refused(self, error: RequestError) -> HttpReply: ...


class VllmReplies:
    """A line of text; errors in OpenAI's shape with the status as their code."""

    def done(self, sentence: str) -> HttpReply:
        return HttpReply(200, sentence.encode(), TEXT)

    def refused(self, error: RequestError) -> HttpReply:
        status = _status(error)
        body = {
            "message": error.message,
            "type": ERROR_TYPES.get(status, "BadRequestError"),
            "param": None,
            "code": status,
        }
        return HttpReply(status, encode({"error": body}), JSON + _headers(status))


class OurReplies(VllmReplies):
    """The same, but what went well is JSON too."""

    def done(self, sentence: str) -> HttpReply:
        return HttpReply(200, encode({"message": sentence}))


class SglangReplies:
    """Always the same fields; names are those of the loaded adapters."""

    def __init__(self, names: Mapping[str, AdapterKey]) -> None:
        self._loaded = {name: written(key) for name, key in names.items()}

    def done(self, sentence: str) -> HttpReply:
        return HttpReply(200, self._body(success=True, error_message=""))

    def refused(self, error: RequestError) -> HttpReply:
        status = _status(error)
        status = status if status in (401, 403, 503) else 400
        return HttpReply(
            status, self._body(success=False, error_message=error.message), JSON + _headers(status)
        )

    def _body(self, *, success: bool, error_message: str) -> bytes:
        return encode(
            {
                "success": success,
                "error_message": error_message,
                "loaded_adapters": self._loaded,
            }
        )


def _status(error: RequestError) -> int:
    return 400 if error.kind == FailureKind.ADAPTER_INVALID else error.status


def _headers(status: int) -> tuple[tuple[bytes, bytes], ...]:
    return {401: CHALLENGE, 503: RETRY}.get(status, ())
