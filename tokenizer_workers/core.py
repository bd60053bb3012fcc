"""What a tokenizer worker decides: the state of each request from its prompt to its end. Pure.

Inputs are methods named after what happened; take_outbox empties what is to be sent. Each prompt
is answered by exactly one End, unless its frontend cancels it. A frontend is known by its
requests: it is request_id >> REQUEST_BITS.

A worker that takes the place of one that died is sent its prompts again, and by the scheduler all
tokens of each. What it makes of these is what its predecessor made of them, so that it says again
only what comes after those that the frontend has heard of.
"""

from array import array
from collections import deque
from collections.abc import Callable

import msgspec

from pipeline.choices import request_ids
from pipeline.errors import RequestError
from pipeline.messages import (
    GONE,
    REQUEST_BITS,
    AdapterTexts,
    AskTexts,
    Cancel,
    End,
    Failure,
    FailureKind,
    Finished,
    FinishReason,
    ForgetTexts,
    GrammarChecked,
    Piece,
    Pieces,
    Prompt,
    PromptDetails,
    PromptLogprobs,
    Rendered,
    Resumed,
    Shutdown,
    StillOpen,
    Submit,
    TokenDetail,
    TokenizerCompared,
    Tokens,
    ToolCallPart,
    Usage,
)
from tokenizer_workers.checked_grammars import CheckedGrammars
from tokenizer_workers.decode import TextDecoder
from tokenizer_workers.details import PromptTokens, Vocabulary
from tokenizer_workers.encode import Encoded
from tokenizer_workers.known_texts import KnownTexts, Ready, ToCompare, refusal
from tokenizer_workers.own_texts import NOTHING, OwnTexts
from tokenizer_workers.renderings import Renderings, ToRender, as_text
from tokenizer_workers.stop_strings import StopStrings
from tokenizer_workers.tool_calls import Said, ToolCallParser

PROCESS = "tokenizer_workers"
CUT_OFF = Failure(
    503,
    FailureKind.INTERNAL,
    "a process of the server died before the reply was complete; the request may be sent again",
)


class ToPeer(msgspec.Struct, frozen=True):
    """A message and the inbox that it is for."""

    process: str
    index: int
    message: Submit | Cancel | StillOpen | Shutdown | PromptDetails | Pieces


class _Outgoing:
    """What goes to one frontend next."""

    __slots__ = ("details", "ends", "prompts", "texts", "tool_calls")

    def __init__(self) -> None:
        self.prompts: list[PromptDetails] = []
        self.texts: dict[_Request, str] = {}  # since the last message
        self.tool_calls: dict[_Request, list[ToolCallPart]] = {}
        self.details: dict[_Request, list[TokenDetail]] = {}
        self.ends: list[End] = []

    def add(self, request: "_Request", text: str) -> None:
        self.texts[request] = self.texts.get(request, "") + text

    def detail(self, request: "_Request", detail: TokenDetail) -> None:
        self.details.setdefault(request, []).append(detail)
        self.texts.setdefault(request, "")  # so that a piece carries it

    def say(self, request: "_Request", said: Said) -> None:
        if said.text:
            self.add(request, said.text)
        if said.parts:
            self.tool_calls.setdefault(request, []).extend(said.parts)
            self.texts.setdefault(request, "")

    def unsay(self, request: "_Request") -> None:
        """What it has said since the last message is not sent."""
        self.texts.pop(request, None)
        self.tool_calls.pop(request, None)
        self.details.pop(request, None)

    def forget(self, request: "_Request") -> None:
        self.unsay(request)
        self.prompts = [one for one in self.prompts if one.request_id != request.request_id]

    def take(self) -> Pieces | None:
        if not (self.texts or self.ends):
            return None
        if self.details or self.tool_calls:
            pieces = [
                Piece(
                    request.request_id,
                    text,
                    tuple(self.details.get(request, ())),
                    tuple(self.tool_calls.get(request, ())),
                    request.completion_tokens,
                )
                for request, text in self.texts.items()
            ]
            self.details, self.tool_calls = {}, {}
        else:
            pieces = [
                Piece(request.request_id, text, (), (), request.completion_tokens)
                for request, text in self.texts.items()
            ]
        message = Pieces(pieces, tuple(self.ends))
        self.texts = {}
        self.ends = []
        return message


class _Request:
    """A request that the scheduler works on."""

    __slots__ = (
        "arrived",
        "completion_tokens",
        "decoder",
        "first_token_at",
        "heard",
        "is_plain",
        "outgoing",
        "parser",
        "prompt",
        "prompt_text",
        "prompt_tokens",
        "request_id",
        "stop",
        "token_decoder",
        "top",
    )

    def __init__(
        self,
        request_id: int,
        *,
        outgoing: _Outgoing,
        heard: int,
        arrived: float,
        prompt_tokens: int,
        decoder: TextDecoder,
        token_decoder: TextDecoder | None,
        stop: StopStrings | None,
        top: int,
        parser: ToolCallParser | None,
    ) -> None:
        self.request_id = request_id
        self.outgoing = outgoing
        self.heard = heard  # tokens whose text the frontend has had from a predecessor
        self.parser = parser
        self.arrived = arrived
        self.prompt_tokens = prompt_tokens
        self.decoder = decoder
        self.token_decoder = token_decoder
        self.stop = stop
        self.top = top
        self.is_plain = token_decoder is None and stop is None and parser is None  # as most are
        self.prompt: PromptTokens | None = None  # while their log-probabilities come in
        self.prompt_text = ""
        self.completion_tokens = 0
        self.first_token_at = 0.0

    def usage(self, now: float) -> Usage:
        """As far as it is known here: not what the queue and the prefix cache did."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            first_token_seconds=self.first_token_at - self.arrived,
            total_seconds=now - self.arrived,
        )


class Core:
    """The requests of one tokenizer worker.

    worker             its index
    frontends          how many feed it
    encode             raises RequestError
    new_decoder        makes what decodes a reply's text
    new_token_decoder  makes what decodes the texts of single tokens, special ones included
    vocabulary         what is told of single tokens
    new_tool_decoder   makes what decodes the text of a reply that may call tools
    texts              what adapters ship for tokenizers; None: that is not looked at

    Times are seconds of time.monotonic().
    """

    def __init__(
        self,
        *,
        worker: int,
        frontends: int,
        encode: Callable[[Prompt], Encoded],
        new_decoder: Callable[[], TextDecoder],
        new_token_decoder: Callable[[], TextDecoder],
        vocabulary: Vocabulary,
        new_tool_decoder: Callable[[], TextDecoder],
        texts: KnownTexts | None = None,
    ) -> None:
        self._texts = texts
        self._new_tool_decoder = new_tool_decoder
        self._grammars = CheckedGrammars()
        self._worker = worker
        self._encode = encode
        self._new_decoder = new_decoder
        self._new_token_decoder = new_token_decoder
        self._vocabulary = vocabulary
        self._requests: dict[int, _Request] = {}
        self._renderings = Renderings()
        self._ready: deque[Ready] = deque()
        self._outgoing = {index: _Outgoing() for index in range(frontends)}
        self._to_scheduler: list[Submit | Cancel | StillOpen | Shutdown] = []

    @property
    def requests(self) -> int:
        """How many are open."""
        waiting = len(self._renderings) + len(self._grammars)
        return len(self._requests) + waiting + (len(self._texts) if self._texts else 0)

    @property
    def frontends(self) -> list[int]:
        """Those that have not said Shutdown. When there are none, this worker has done its work."""
        return list(self._outgoing)

    def prompt(self, prompt: Prompt, now: float) -> None:
        """Submit it, or end it with the reason why not."""
        if prompt.adapter is None or self._texts is None:
            self._render_or_encode(prompt, NOTHING, now)
            return
        own = self._texts.of(prompt, now)
        if own is not None:
            self._with_texts(prompt, own, now)

    def texts_told(
        self, message: AdapterTexts | ForgetTexts | TokenizerCompared, now: float
    ) -> None:
        """Of the texts of adapters; what comes of it is for `go_on`."""
        if self._texts is None:
            return
        match message:
            case AdapterTexts():
                self._texts.told(message, now)
            case ForgetTexts():
                self._texts.forget(message, now)
            case TokenizerCompared():
                self._texts.compared(message, now)
        self._ready += self._texts.take_ready()

    def expire(self, now: float) -> None:
        """What waits for the adapter loader does not wait for ever."""
        if self._texts is not None:
            self._texts.expire(now)
            self._ready += self._texts.take_ready()

    @property
    def is_ready(self) -> bool:
        """Whether there are prompts whose adapters' texts have come."""
        return bool(self._ready)

    def go_on(self, now: float) -> Prompt:
        """With the first of those."""
        prompt, own = self._ready.popleft()
        if isinstance(own, RequestError):
            self._refuse(prompt, own, now)
        else:
            self._with_texts(prompt, own, now)
        return prompt

    def take_questions(self) -> list[AskTexts]:
        """For the adapter loader; each is answered by an AdapterTexts."""
        return self._texts.take_questions() if self._texts else []

    def take_comparisons(self) -> list[ToCompare]:
        """Tokenizers to be compared beside all this; each is answered by a TokenizerCompared."""
        return self._texts.take_comparisons() if self._texts else []

    def _with_texts(self, prompt: Prompt, own: OwnTexts, now: float) -> None:
        if own.problem:
            self._refuse(prompt, refusal(own), now)
            return
        if own.eos is not None and not prompt.ignore_eos:
            ends = (*prompt.stop_token_ids, own.eos)
            prompt = msgspec.structs.replace(prompt, stop_token_ids=ends)
        self._render_or_encode(prompt, own, now)

    def _render_or_encode(self, prompt: Prompt, own: OwnTexts, now: float) -> None:
        template = prompt.chat_options.template or own.template
        if prompt.chat is not None and template:
            self._renderings.add(prompt, template, own.special_tokens if own.template else None)
        else:
            self._encode_or_refuse(prompt, now)

    def _refuse(self, prompt: Prompt, error: RequestError, now: float) -> None:
        outgoing = self._outgoing[prompt.request_id >> REQUEST_BITS]
        outgoing.ends += [_refused(prompt, one, error, now) for one in _request_ids(prompt)]

    def _encode_or_refuse(self, prompt: Prompt, now: float) -> None:
        try:
            encoded = self._encode(prompt)
            if encoded.grammar and not self._grammars.may_be_used(prompt, encoded):
                return  # it is being compiled
        except RequestError as error:
            self._refuse(prompt, error, now)
            return
        self._submit(prompt, encoded)

    def take_checks(self) -> list[str]:
        """Grammars to be compiled beside all this; each is answered by `grammar_checked`."""
        return self._grammars.take()

    def grammar_checked(self, message: GrammarChecked, now: float) -> None:
        """Those that wait for it are submitted, or end with the reason why not."""
        for prompt, encoded in self._grammars.checked(message):
            if not message.error:
                self._submit(prompt, encoded)
                continue
            self._refuse(prompt, RequestError(422, FailureKind.GRAMMAR, message.error), now)

    def _submit(self, prompt: Prompt, encoded: Encoded) -> None:
        outgoing = self._outgoing[prompt.request_id >> REQUEST_BITS]
        for request_id, heard in _heard(prompt):
            request = self._new_request(request_id, outgoing, heard, prompt, encoded)
            self._requests[request_id] = request
        if prompt.prompt_details and prompt.request_id in self._requests:
            self._tell_prompt(outgoing, prompt, encoded)
        self._to_scheduler.append(
            Submit(
                request_id=prompt.request_id,
                worker=self._worker,
                arrived=prompt.arrived,
                token_ids=encoded.token_ids,
                max_tokens=encoded.max_tokens,
                adapter=prompt.adapter,
                adapter_token=prompt.adapter_token,
                sampling=prompt.sampling,
                ignore_eos=prompt.ignore_eos,
                logprobs=prompt.logprobs,
                tenant=prompt.tenant,
                choices=prompt.choices,
                stop_token_ids=prompt.stop_token_ids,
                trace=prompt.trace,
                grammar=encoded.grammar,
                pooling=prompt.pooling,
                heard=prompt.heard,
            )
        )

    def renders(self, request_id: int) -> bool:
        """Whether this request waits for its chat to become text."""
        return request_id in self._renderings

    def waits(self, request_id: int) -> bool:
        """Whether it waits for that, or for its adapter's texts."""
        in_texts = self._texts is not None and request_id in self._texts
        return in_texts or self.renders(request_id)

    def take_renderings(self) -> list[ToRender]:
        """Chats to be rendered beside all this; each is answered by `rendered`."""
        return self._renderings.take()

    def rendered(self, message: Rendered, now: float) -> Prompt | None:
        """A chat has become text; gives its prompt, if somebody still waits for it."""
        prompt = self._renderings.done(message.request_id)
        if prompt is None:
            return None
        if message.failure is None:
            self._encode_or_refuse(as_text(prompt, message.text), now)
        else:
            failure = message.failure
            error = RequestError(failure.status, failure.kind, failure.message)
            self._refuse(prompt, error, now)
        return prompt

    def cancel(self, request_id: int) -> None:
        """Forget the request: its frontend hears no more of it. The scheduler may know it from a
        predecessor also where it is not known here."""
        if self._texts is not None:
            self._texts.cancel(request_id)
        if self._ready:
            self._ready = deque(one for one in self._ready if one[0].request_id != request_id)
        self._renderings.done(request_id)
        self._grammars.cancel(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.outgoing.forget(request)
        self._to_scheduler.append(Cancel(request_id))

    def tokens(self, message: Tokens, now: float) -> None:
        """The tokens of a step. Those of requests that are over here are dropped."""
        requests = self._requests
        for at, (request_id, token_id) in enumerate(
            zip(message.request_ids, message.token_ids, strict=True)
        ):
            request = requests.get(request_id)
            if request is None:
                continue
            if not request.first_token_at:
                request.first_token_at = now
            request.completion_tokens += 1
            text = request.decoder.push(token_id)
            if not request.is_plain:
                self._look_closer(request, token_id, text, message.logprobs.get(at), now)
            elif text:
                request.outgoing.add(request, text)
        for finished in message.finished:
            self._finished(finished, now)

    def _look_closer(
        self, request: _Request, token_id: int, text: str, logprobs: bytes | None, now: float
    ) -> None:
        """At a token of a request that wants more than its text."""
        if request.token_decoder is not None:
            own_text = request.token_decoder.push(token_id)
            detail = self._vocabulary.detail(token_id, own_text, logprobs, request.top)
            request.outgoing.detail(request, detail)
        if request.stop is not None:
            text = request.stop.push(text)
        if text:
            self._say(request, text)
        stopped = request.stop is not None and request.stop.matched
        if stopped or (request.parser is not None and request.parser.is_over):
            self._stopped(request, now)

    def resumed(self, message: Resumed, now: float) -> None:
        """All tokens of a request that its predecessor had. What the frontend knows is not said
        again."""
        request = self._requests.get(message.request_id)
        if request is None:
            return
        self._add_to_prompt(request, message.prompt_logprobs)
        request.first_token_at = message.first_token
        token_ids, heard = array("i", message.token_ids).tolist(), request.heard
        self._replay(request, token_ids[:heard], message.logprobs[:heard], now)
        request.outgoing.unsay(request)
        self._replay(request, token_ids[heard:], message.logprobs[heard:], now)
        if message.finished is not None:
            self._finished(message.finished, now)

    def _replay(
        self, request: _Request, token_ids: list[int], logprobs: list[bytes], now: float
    ) -> None:
        request_ids = [request.request_id] * len(token_ids)
        rows = dict(enumerate(logprobs))
        self.tokens(Tokens(request_ids, token_ids, rows), now)

    def prompt_logprobs(self, message: PromptLogprobs) -> None:
        """When the last have come, so have all details of the prompt."""
        request = self._requests.get(message.request_id)
        if request is not None:
            self._add_to_prompt(request, message.rows)

    def still_open(self, message: StillOpen) -> None:
        """The scheduler is told before these prompts are submitted again."""
        self._to_scheduler.append(message)

    def frontend_started(self, frontend: int) -> None:
        """Another incarnation, which waits for nothing that the one before has asked for."""
        self._forget_all_of(frontend)
        self._outgoing[frontend] = _Outgoing()

    def scheduler_started(self, now: float) -> None:
        """Another incarnation, which knows nothing of what was submitted to the one before: that
        ends here."""
        self._to_scheduler = []
        requests, self._requests = self._requests, {}
        for request_id, request in requests.items():
            end = End(request_id, FinishReason.ERROR, request.usage(now), CUT_OFF)
            request.outgoing.ends.append(end)

    def loader_started(self, now: float) -> None:
        """Another incarnation of the adapter loader, which has been asked nothing."""
        if self._texts is not None:
            self._texts.loader_started(now)

    def _forget_all_of(self, frontend: int) -> None:
        if self._texts is not None:
            self._texts.forget_frontend(frontend)
        self._ready = deque(
            one for one in self._ready if one[0].request_id >> REQUEST_BITS != frontend
        )
        self._renderings.forget(frontend)
        self._grammars.forget(frontend)
        for request_id in [r for r in self._requests if r >> REQUEST_BITS == frontend]:
            self.cancel(request_id)

    def shutdown(self, frontend: int) -> None:
        """A frontend has gone; when all have, the scheduler is told."""
        self._forget_all_of(frontend)
        self._outgoing.pop(frontend, None)  # it may have told the predecessor too
        if not self._outgoing:
            self._to_scheduler.append(Shutdown(PROCESS, self._worker))

    def take_outbox(self) -> list[ToPeer]:
        """What is to be sent, in order: one message at most to each frontend."""
        messages = [ToPeer("scheduler", 0, message) for message in self._to_scheduler]
        self._to_scheduler = []
        for index, outgoing in self._outgoing.items():
            messages += [ToPeer("frontend", index, prompt) for prompt in outgoing.prompts]
            outgoing.prompts = []
            pieces = outgoing.take()
            if pieces is not None:
                messages.append(ToPeer("frontend", index, pieces))
        return messages

    def _new_request(
        self, request_id: int, outgoing: _Outgoing, heard: int, prompt: Prompt, encoded: Encoded
    ) -> _Request:
        calls = encoded.new_parser is not None
        return _Request(
            request_id,
            outgoing=outgoing,
            heard=heard,
            arrived=prompt.arrived,
            prompt_tokens=encoded.prompt_tokens,
            decoder=self._new_tool_decoder() if calls else self._new_decoder(),
            token_decoder=self._new_token_decoder() if prompt.token_details else None,
            stop=StopStrings(prompt.stop, prompt.keep_stop) if prompt.stop else None,
            top=prompt.logprobs.top if prompt.logprobs is not None else 0,
            parser=None if encoded.new_parser is None else encoded.new_parser(),
        )

    def _tell_prompt(self, outgoing: _Outgoing, prompt: Prompt, encoded: Encoded) -> None:
        """At once, or when the log-probabilities that are wanted are there."""
        whole = prompt.text if prompt.truncate is None else None
        text = self._text_of(encoded) if whole is None else whole
        if prompt.logprobs is None or prompt.logprobs.prompt_top is None:
            outgoing.prompts.append(PromptDetails(prompt.request_id, text))
            return
        request = self._requests[prompt.request_id]
        request.prompt = PromptTokens(
            encoded.token_ids, prompt.logprobs, self._vocabulary, self._new_token_decoder()
        )
        request.prompt_text = text
        self._add_to_prompt(request, [])

    def _add_to_prompt(self, request: _Request, rows: list[bytes]) -> None:
        """Nobody may want them: then they have been told."""
        prompt = request.prompt
        if prompt is None:
            return
        prompt.add(rows)
        if prompt.complete:
            details = PromptDetails(request.request_id, request.prompt_text, tuple(prompt.details))
            request.outgoing.prompts.append(details)
            request.prompt = None

    def _text_of(self, encoded: Encoded) -> str:
        decoder = self._new_decoder()
        texts = [decoder.push(token_id) for token_id in array("i", encoded.token_ids)]
        return "".join(texts) + decoder.finish()

    def _say(self, request: _Request, text: str) -> None:
        if request.parser is None:
            request.outgoing.add(request, text)
        else:
            request.outgoing.say(request, request.parser.push(text))

    def _stopped(self, request: _Request, now: float) -> None:
        """A stop string matched, or the only call of a tool is over: the end is told here, and the
        scheduler hears of it last."""
        del self._requests[request.request_id]
        if request.parser is not None and not request.parser.is_over:
            request.outgoing.say(request, request.parser.finish())
        end = End(request.request_id, FinishReason.STOP, request.usage(now))
        request.outgoing.ends.append(end)
        self._to_scheduler.append(Cancel(request.request_id, stopped=True))

    def _finished(self, finished: Finished, now: float) -> None:
        request = self._requests.pop(finished.request_id, None)
        if request is None:
            return
        text, reason = request.decoder.finish(), finished.reason
        if request.stop is not None:
            text = request.stop.push(text)
            if request.stop.matched:
                reason = FinishReason.STOP
            else:
                text += request.stop.finish()
        if text:
            self._say(request, text)
        if request.parser is not None and not request.parser.is_over:
            request.outgoing.say(request, request.parser.finish())
        request.outgoing.ends.append(
            End(finished.request_id, reason, finished.usage, finished.failure, finished.embedding)
        )


def _request_ids(prompt: Prompt) -> list[int]:
    """Those that somebody waits for."""
    return [request_id for request_id, _ in _heard(prompt)]


def _heard(prompt: Prompt) -> list[tuple[int, int]]:
    """The requests that somebody waits for, and how many tokens of each the frontend has."""
    ids = request_ids(prompt.request_id, prompt.choices)
    if prompt.heard is None:
        return [(request_id, 0) for request_id in ids]
    both = zip(ids, prompt.heard, strict=True)
    return [(request_id, heard) for request_id, heard in both if heard != GONE]


def _refused(prompt: Prompt, request_id: int, error: RequestError, now: float) -> End:
    return End(
        request_id,
        FinishReason.ERROR,
        Usage(prompt_tokens=0, completion_tokens=0, total_seconds=now - prompt.arrived),
        Failure(error.status, FailureKind(error.kind), error.message),
    )
