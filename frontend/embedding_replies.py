"""Embeddings as OpenAI, LoRAX and Hugging Face write them down."""

from array import array
from base64 import b64encode
from collections.abc import Iterable, Iterator

import msgspec

from frontend import lorax_replies, openai_replies
from frontend.calls import Part, WholeShape, end_of_all
from frontend.exchange import HttpReply, PiecewiseReply
from frontend.parameters import ParameterError
from pipeline.errors import RequestError
from pipeline.messages import End, FailureKind

encode = msgspec.json.Encoder().encode


class OpenAIEmbeddings(WholeShape):
    """POST /v1/embeddings.

    model   as the client called it
    base64  of little-endian float32, else lists of numbers
    """

    def __init__(self, *, model: str, base64: bool, inputs: int) -> None:
        self._model = model
        self._base64 = base64
        self._inputs = inputs

    def whole(self, parts: list[Part]) -> PiecewiseReply:
        ends = _ends(parts)
        tokens = end_of_all(ends, prompts=self._inputs).usage.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        told = _base64 if self._base64 else _numbers
        embeddings = (
            encode({"object": "embedding", "index": index, "embedding": told(end)})
            for index, end in enumerate(ends)
        )
        rest = b'],"object":"list",%b' % encode({"model": self._model, "usage": usage})[1:]
        return PiecewiseReply(200, _listed(b'{"data":[', embeddings, rest))

    def refusal(self, error: RequestError) -> HttpReply:
        return openai_replies.refusal(error)

    def failed(self, choice: int, error: RequestError) -> HttpReply:
        return self.refusal(_of_input(error, choice, self._inputs, "input"))


class LoraxEmbedding(WholeShape):
    """POST /embed: of one text."""

    def whole(self, parts: list[Part]) -> HttpReply:
        [end] = _ends(parts)
        return HttpReply(200, encode({"embeddings": _numbers(end)}))

    def refusal(self, error: RequestError) -> HttpReply:
        return lorax_replies.refusal(error, streamed=False)


class FeatureExtraction(WholeShape):
    """POST /pipeline/feature-extraction: a list for each text, also if there is one."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs

    def whole(self, parts: list[Part]) -> PiecewiseReply:
        embeddings = (encode(_numbers(end)) for end in _ends(parts))
        return PiecewiseReply(200, _listed(b"[", embeddings, b"]"))

    def refusal(self, error: RequestError) -> HttpReply:
        return lorax_replies.refusal(error, streamed=False)

    def failed(self, choice: int, error: RequestError) -> HttpReply:
        return self.refusal(_of_input(error, choice, self._inputs, "inputs"))


def _listed(before: bytes, items: Iterable[bytes], after: bytes) -> Iterator[bytes]:
    """The pieces of a body, each made when it is asked for."""
    for item in items:
        yield before + item
        before = b","
    yield after


def _ends(parts: list[Part]) -> list[End]:
    return [part.end for part in parts if part.end is not None]


def _numbers(end: End) -> list[float]:
    return array("f", end.embedding).tolist()


def _base64(end: End) -> str:
    return b64encode(end.embedding).decode()


def _of_input(error: RequestError, at: int, inputs: int, parameter: str) -> RequestError:
    """What is wrong with one of several inputs says with which."""
    if inputs == 1 or error.kind != FailureKind.VALIDATION:
        return error
    return ParameterError(
        f"{parameter}[{at}]", f"`{parameter}[{at}]`: {error.message}", error.status
    )
