"""What stands behind the frontend in its tests, and builders of what passes between them."""

import asyncio
import json
import threading
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from frontend.app import make_administration, make_app
from frontend.calls import Call, ReplyShape
from frontend.commands import Commands
from frontend.downstream import Downstream
from frontend.exchange import HttpReply
from frontend.processes import Processes
from frontend.tracing import Tracing
from pipeline.choices import request_ids
from pipeline.config import Settings
from pipeline.messages import (
    Alternative,
    Cancel,
    End,
    Failure,
    FailureKind,
    FinishReason,
    Message,
    Piece,
    Pieces,
    ProcessReady,
    Prompt,
    PromptDetails,
    TokenDetail,
    Tokenize,
    Tokenized,
    Usage,
)

BASE = "some/base"
OTHERS = ("tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")
FACTS: dict[str, dict[str, str | int | float | None]] = {
    "tokenizer_workers": {"max_total_tokens": 512},
    "scheduler": {"kv_blocks": 100, "kv_block_tokens": 16},
    "gpu_worker": {"device": "cpu", "dtype": "float32", "hidden_size": 4},
}

Answer = Callable[[Prompt], Iterable[Pieces | PromptDetails]]


def settings(**changes: Any) -> Settings:
    return Settings(**{"model_id": BASE, "adapter_root": (), **changes})


def usage(prompt_tokens: int = 3, completion_tokens: int = 2, **changes: Any) -> Usage:
    return Usage(prompt_tokens, completion_tokens, **changes)


def end(
    request_id: int = 1,
    reason: FinishReason = FinishReason.EOS,
    *,
    failure: Failure | None = None,
    **counts: Any,
) -> End:
    reason = FinishReason.ERROR if failure else reason
    return End(request_id, reason, usage(**counts), failure)


def failure(
    kind: FailureKind = FailureKind.ADAPTER_NOT_FOUND, status: int = 404, message: str = "no such"
) -> Failure:
    return Failure(status, kind, message)


def token(token_id: int = 5, text: str = "a", *, special: bool = False) -> TokenDetail:
    return TokenDetail(token_id, text, -0.5, special)


def likeliest(prompt: Prompt, detail: TokenDetail) -> TokenDetail:
    """The token with as many alternatives as the prompt wants, itself the first of them."""
    top = prompt.logprobs.top if prompt.logprobs is not None else 0
    others = [Alternative(detail.id + at, f"{detail.text}{at}", -at) for at in range(1, top)]
    first = Alternative(detail.id, detail.text, detail.logprob or 0.0)
    return msgspec.structs.replace(detail, alternatives=(first, *others)[:top])


def piece(text: str = "a", request_id: int = 1, tokens: Sequence[TokenDetail] = ()) -> Piece:
    return Piece(request_id, text, tuple(tokens))


def says(*texts: str, reason: FinishReason = FinishReason.EOS) -> Answer:
    """An answer of one message per text, and one token per text; the end comes with the last.

    All choices say the same, one after the other; the prompt is told first, if that is wanted.
    """

    def answer(prompt: Prompt) -> Iterable[Pieces | PromptDetails]:
        if prompt.prompt_details:
            yield PromptDetails(prompt.request_id, prompt.text or "ids", prompt_tokens(prompt))
        for request_id in request_ids(prompt.request_id, prompt.choices):
            for at, text in enumerate(texts):
                tokens = [likeliest(prompt, token(at, text))] if prompt.token_details else []
                ends = (end(request_id, reason, completion_tokens=len(texts)),)
                last = at == len(texts) - 1
                yield Pieces([piece(text, request_id, tokens)], ends if last else ())

    return answer


def prompt_tokens(prompt: Prompt) -> tuple[TokenDetail, ...]:
    """One for each letter, if their log-probabilities are wanted."""
    if prompt.logprobs is None or prompt.logprobs.prompt_top is None:
        return ()
    first, *others = list(prompt.text or "ids")
    return (TokenDetail(1, first, None, False), *(token(2, other) for other in others))


def fails(failed: Failure, *texts: str) -> Answer:
    """An answer that fails after some text."""

    def answer(prompt: Prompt) -> Iterable[Pieces | PromptDetails]:
        for at, text in enumerate(texts):
            yield Pieces([piece(text, prompt.request_id, [token(at, text)])])
        yield Pieces([], (end(prompt.request_id, failure=failed),))

    return answer


def silence(prompt: Prompt) -> Iterable[Pieces | PromptDetails]:
    """No answer at all."""
    return ()


def letters_of(question: Tokenize) -> Tokenized:
    """Each letter is a token, after one that is added; a text of digits cannot be told."""
    if question.text.isdecimal():
        return Tokenized(question.question_id, failure=failure(FailureKind.VALIDATION, 400, "no"))
    texts = (*(["<s>"] * question.add_special_tokens), *question.text)
    spans = [(0, 0)] * question.add_special_tokens
    spans += [(at, at + 1) for at in range(len(question.text))]
    return Tokenized(
        question.question_id,
        array("i", range(len(texts))).tobytes(),
        texts,
        array("i", [at for span in spans for at in span]).tobytes(),
    )


class Backend:
    """All other processes: keeps what it is sent, and answers each prompt.

    ready  whether they have said so
    seen   set once a message of that kind has been sent
    """

    def __init__(
        self,
        answer: Answer = silence,
        *,
        ready: bool = True,
        index: int = 0,
        keep_alive_seconds: float = 15.0,
        tracing: Tracing | None = None,
        **changes: Any,
    ) -> None:
        self.answer = answer
        self.settings = settings(**changes)
        self.sent: list[tuple[str, Message, int]] = []
        self.seen: defaultdict[type[Message], threading.Event] = defaultdict(threading.Event)
        self.downstream = Downstream(
            self.settings, index, self.send, keep_alive_seconds=keep_alive_seconds
        )
        self.processes = Processes(self.settings)
        if ready:
            for process in OTHERS:
                self.processes.ready(ProcessReady(process, 0, FACTS.get(process, {})))
        self.commands = Commands(index, self.send)
        self.administration = make_administration(
            self.settings,
            downstream=self.downstream,
            processes=self.processes,
            commands=self.commands,
        )
        self.app = make_app(
            self.settings,
            index,
            downstream=self.downstream,
            processes=self.processes,
            administration=self.administration,
            tracing=tracing,
        )

    def send(self, process: str, message: Message, index: int) -> None:
        self.sent.append((process, message, index))
        self.seen[type(message)].set()
        if isinstance(message, Tokenize):
            asyncio.get_running_loop().call_soon(self.downstream.tokenized, letters_of(message))
        if isinstance(message, Prompt):
            for answer in self.answer(message):
                asyncio.get_running_loop().call_soon(self._deliver, answer)

    def _deliver(self, message: Pieces | PromptDetails) -> None:
        if isinstance(message, PromptDetails):
            self.downstream.tell_prompt(message)
        else:
            self.downstream.deliver(message)

    def prompts(self) -> list[Prompt]:
        return [message for _, message, _ in self.sent if isinstance(message, Prompt)]

    def cancelled(self) -> list[int]:
        return [message.request_id for _, message, _ in self.sent if isinstance(message, Cancel)]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Talks to the application without a socket; streams arrive in one piece."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, json=body, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path, **options)


class Connection:
    """One request, driven by hand: parts of its reply are read as they are sent, and it can go."""

    def __init__(self, backend: Backend, path: str, body: Any) -> None:
        data = json.dumps(body).encode()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(backend.app(scope, self._incoming.get, self.parts.put))

    async def start(self) -> int:
        """The status."""
        message = await self.parts.get()
        assert message["type"] == "http.response.start"
        return int(message["status"])

    async def part(self) -> bytes:
        """The next part of the body; empty when it was the last one, which is always sent."""
        message = await self.parts.get()
        assert message["type"] == "http.response.body"
        return bytes(message["body"])

    def go(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})


def events(stream: bytes | str) -> list[Any]:
    """The data of each event; `[DONE]` stays as it is, comments are left out."""
    text = stream.decode() if isinstance(stream, bytes) else stream
    assert text.endswith("\n\n")
    datas = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def call_of(outcome: Call | HttpReply) -> Call:
    assert isinstance(outcome, Call), outcome
    return outcome


def refusal_of(outcome: Call | HttpReply) -> HttpReply:
    assert isinstance(outcome, HttpReply)
    return outcome


def streamed(shape: ReplyShape, *pieces: Piece, last: End) -> list[Any]:
    """The events of a stream whose last piece comes with its end."""
    parts = [shape.opening(), *(shape.events([one]) for one in pieces[:-1])]
    return events(b"".join([*parts, shape.closing(list(pieces[-1:]), last)]))


def make_adapter(root: Path, name: str) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


def json_of(reply: HttpReply) -> Any:
    return msgspec.json.decode(reply.body)
