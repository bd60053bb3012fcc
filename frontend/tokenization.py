"""LoRAX's /tokenize: the tokens of a text, which a tokenizer worker is asked for."""

from array import array

import msgspec
from starlette.requests import Request

from frontend import lorax_replies, metrics
from frontend.downstream import Downstream
from frontend.exchange import CLIENT_GONE, RETRY, ClientGone, HttpReply, Unreadable, read_json
from frontend.parameters import MalformedJson, decode
from frontend.processes import Processes
from pipeline.errors import RequestError
from pipeline.messages import Tokenized

PATH = "/tokenize"


class Inputs(msgspec.Struct, kw_only=True):
    """POST /tokenize. Unknown fields are ignored, as by all LoRAX routes."""

    inputs: str
    add_special_tokens: bool | None = None  # null: true


class Tokenization:
    """The endpoint. The tokenizer is the base model's, whatever the adapter."""

    def __init__(
        self, *, downstream: Downstream, processes: Processes, max_body_bytes: int
    ) -> None:
        self._downstream = downstream
        self._processes = processes
        self._max_body_bytes = max_body_bytes
        self._inputs = msgspec.json.Decoder(Inputs)

    async def endpoint(self, request: Request) -> HttpReply:
        try:
            reply = await self._answer(request)
        except ClientGone:  # before the body was read; nobody reads this
            reply = HttpReply(CLIENT_GONE, b"")
        except RequestError as error:
            reply = lorax_replies.refusal(error, streamed=False)
        metrics.REQUESTS.labels(PATH, reply.status).inc()
        return reply

    async def _answer(self, request: Request) -> HttpReply:
        """Raises ClientGone and RequestError."""
        missing = self._processes.missing()
        if missing:
            sentence = f"The server is starting; not ready yet: {', '.join(missing)}"
            return lorax_replies.http_error(503, sentence, RETRY)
        try:
            body = await read_json(request.scope, request.receive, self._max_body_bytes)
        except Unreadable as error:
            return lorax_replies.http_error(error.status, error.sentence)
        try:
            given = decode(self._inputs, body)
        except MalformedJson as error:
            return lorax_replies.http_error(400, str(error))
        except RequestError as error:
            return lorax_replies.not_understood(error)
        tokenized = await self._downstream.tokenize(
            given.inputs, add_special_tokens=given.add_special_tokens is not False
        )
        return HttpReply(200, lorax_replies.encode(tokens_of(tokenized)))


def tokens_of(tokenized: Tokenized) -> list[dict[str, int | str]]:
    spans = array("i", tokenized.spans)
    return [
        {"id": token_id, "text": text, "start": start, "stop": stop}
        for token_id, text, start, stop in zip(
            array("i", tokenized.token_ids), tokenized.texts, spans[::2], spans[1::2], strict=True
        )
    ]
