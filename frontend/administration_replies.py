"""What administrators are answered, in the words of vLLM and of SGLang.

Controllers look at status, text and the words in errors ("has already been loaded" is as good as
loaded to some, "cannot be found" as good as unloaded), so these are kept. They were read in
vllm/entrypoints/openai/models/serving.py of vLLM, and in lora_manager.py, lora_registry.py and
http_server.py of SGLang's runtime.
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
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
USER_INPUT = "InvalidUserInput"  # the type of what vLLM itself finds wrong with a request

encode = msgspec.json.Encoder().encode


class Replies(Protocol):
    """How one family of routes answers."""

    def done(self, sentence: str) -> HttpReply: ...

    def refused(self, error: RequestError, name: str) -> HttpReply:
        """name is the one that the request was about; it may be empty."""
        ...


class VllmReplies:
    """A line of text; errors in OpenAI's shape with the status as their code."""

    WORDS = {
        FailureKind.NAME_TAKEN: (
            "The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        ),
        FailureKind.NAME_UNKNOWN: "The lora adapter '{name}' cannot be found.",
    }

    def done(self, sentence: str) -> HttpReply:
        return HttpReply(200, sentence.encode(), TEXT)

    def refused(self, error: RequestError, name: str) -> HttpReply:
        status = _status(error)
        by_user = status == 400 and error.kind != FailureKind.ADAPTER_INVALID
        body = {
            "message": _worded(self.WORDS, error, name=name),
            "type": USER_INPUT if by_user else ERROR_TYPES.get(status, "BadRequestError"),
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

    WORDS = {
        FailureKind.NAME_TAKEN: "Failed to load LoRA adapter {name} because it is already loaded",
        FailureKind.NAME_UNKNOWN: "LoRA with name {name} does not exist. Loaded LoRAs: {loaded}",
    }

    def __init__(self, names: Mapping[str, AdapterKey]) -> None:
        self._loaded = {name: written(key) for name, key in names.items()}

    def done(self, sentence: str) -> HttpReply:
        return HttpReply(200, self._body(success=True, error_message=""))

    def refused(self, error: RequestError, name: str) -> HttpReply:
        status = _status(error)
        status = status if status in (401, 403, 503) else 400
        message = _worded(self.WORDS, error, name=name, loaded=", ".join(self._loaded) or "none")
        return HttpReply(
            status, self._body(success=False, error_message=message), JSON + _headers(status)
        )

    def _body(self, *, success: bool, error_message: str) -> bytes:
        return encode(
            {
                "success": success,
                "error_message": error_message,
                "loaded_adapters": self._loaded,
            }
        )


def _worded(words: Mapping[FailureKind, str], error: RequestError, **values: str) -> str:
    for kind, sentence in words.items():
        if error.kind == kind:
            return sentence.format(**values)
    return error.message


def _status(error: RequestError) -> int:
    return 400 if error.kind == FailureKind.ADAPTER_INVALID else error.status


def _headers(status: int) -> tuple[tuple[bytes, bytes], ...]:
    return {401: CHALLENGE, 503: RETRY}.get(status, ())
