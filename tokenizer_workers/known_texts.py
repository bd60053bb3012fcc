"""What adapters ship for tokenizers, as far as it is known, and who waits to hear of it: pure.

    of -> known
       -> AskTexts -> told -> known
                           -> to_compare -> compared -> known
                           -> cannot be had

The adapter loader is asked about each adapter when its first prompt comes, and again when that was
too long ago, as the scheduler has the weights asked about again: beside the prompts in the second
half of the time, before them later. A merge is what its parts have in common. What is kept is
bounded; that of the adapters that were used least recently goes.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from pipeline.errors import RequestError
from pipeline.messages import (
    REQUEST_BITS,
    AdapterKey,
    AdapterTexts,
    AskTexts,
    Failure,
    FailureKind,
    ForgetTexts,
    Prompt,
    TokenizerCompared,
)
from tokenizer_workers.own_texts import NOTHING, OwnTexts, disagreement

TOKENIZER_FILE = "tokenizer.json"
MAX_CHARACTERS = 64 << 20
MAX_KNOWN = 20_000
MAX_VERDICTS = 256
TOLD_VERDICTS = 32  # of them, that go with each question
MAX_COMPARING = 16  # each may have 32 MiB
ASK_AGAIN_SECONDS = 10.0  # the question may have been lost

TOO_MANY = Failure(
    503,
    FailureKind.ADAPTER_UNAVAILABLE,
    "its tokenizer has not been compared with the base model's: too many others are; try again",
)

Ready = tuple[Prompt, OwnTexts | RequestError]


class ToCompare(msgspec.Struct, frozen=True):
    """A tokenizer.json that nobody has compared yet."""

    tokenizer: str  # its sha256
    content: bytes


@dataclass(slots=True)
class _Known:
    """What was read for one adapter, when its question was asked."""

    version: str
    texts: OwnTexts
    tokenizer: str
    difference: str | None  # of the tokenizer; None while it is compared
    asked_at: float


@dataclass(slots=True)
class _Question:
    message: AskTexts
    asked_at: float
    sent_at: float


@dataclass(slots=True)
class _Waiting:
    prompt: Prompt
    since: dict[AdapterKey, float]  # what was asked of a part then or later is an answer
    until: float


class KnownTexts:
    """Its length is the number of prompts that wait.

    worker              the index of the tokenizer worker
    read                of files by name, tokenizer.json aside
    base_tokenizer      sha256 of the base model's tokenizer.json
    revalidate_seconds  an answer is good for so long
    wait_seconds        a prompt waits for so long
    """

    def __init__(
        self,
        *,
        worker: int,
        read: Callable[[Mapping[str, bytes]], OwnTexts],
        base_tokenizer: str,
        revalidate_seconds: float,
        wait_seconds: float,
    ) -> None:
        self._worker = worker
        self._read = read
        self._base_tokenizer = base_tokenizer
        self._revalidate_seconds = revalidate_seconds
        self._wait_seconds = wait_seconds
        self._known: OrderedDict[AdapterKey, _Known] = OrderedDict()  # the latest used last
        self._characters = 0
        self._verdicts: OrderedDict[str, str] = OrderedDict()  # tokenizer -> how it differs
        self._comparing: set[str] = set()
        self._questions: dict[AdapterKey, _Question] = {}
        self._count = 0
        self._waiting: dict[int, _Waiting] = {}
        self._ready: list[Ready] = []
        self._to_ask: list[AskTexts] = []
        self._to_compare: list[ToCompare] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def of(self, prompt: Prompt, now: float) -> OwnTexts | None:
        """What holds for the prompt; None: it waits, and comes with take_ready."""
        assert prompt.adapter is not None
        parts = prompt.adapter.parts
        oldest = now - self._revalidate_seconds
        since = {}
        for key in parts:
            known = self._known.get(key)
            if known is None or known.asked_at + self._revalidate_seconds / 2 <= now:
                self._ask(key, prompt.adapter_token, now)
            fresh = known is not None and known.asked_at >= oldest
            since[key] = oldest if fresh else self._questions[key].asked_at
        texts = self._texts(prompt.adapter, since)
        if texts is None:
            self._waiting[prompt.request_id] = _Waiting(prompt, since, now + self._wait_seconds)
        return texts

    def told(self, answer: AdapterTexts, now: float) -> None:
        """The loader has answered. What answers no question is dropped."""
        key = answer.adapter
        question = self._questions.get(key)
        if question is None or question.message.question_id != answer.question_id:
            return
        del self._questions[key]
        known = self._known.get(key)
        if answer.failure is not None:
            self._not_had(key, known, answer.failure, now)
        elif answer.files is not None:
            if self._has_room(answer.tokenizer):
                self._keep(key, answer, answer.files, question.asked_at)
            else:
                self._not_had(key, known, TOO_MANY, now)
        elif known is not None and known.version == answer.version:
            known.asked_at = question.asked_at
        self._release(now)

    def compared(self, message: TokenizerCompared, now: float) -> None:
        """How an adapter's tokenizer differs from the base model's, if it does."""
        self._comparing.discard(message.tokenizer)
        self._verdicts[message.tokenizer] = message.difference
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        for known in self._known.values():
            if known.tokenizer == message.tokenizer:
                known.difference = message.difference
        self._release(now)

    def forget(self, message: ForgetTexts, now: float) -> None:
        """What is known, or is being asked, may be outdated."""
        self._drop(message.adapter)
        self._questions.pop(message.adapter, None)
        self._release(now)

    def expire(self, now: float) -> None:
        """Prompts whose time is over fail; questions without an answer are asked again."""
        for request_id, waiting in list(self._waiting.items()):
            if now >= waiting.until:
                adapter = waiting.prompt.adapter
                assert adapter is not None
                sentence = f"its files were not read within {self._wait_seconds:g} seconds"
                failure = Failure(503, FailureKind.ADAPTER_UNAVAILABLE, sentence)
                self._fail(request_id, adapter, failure)
        for key, question in list(self._questions.items()):
            if now >= question.asked_at + self._wait_seconds:
                del self._questions[key]
            elif now >= question.sent_at + ASK_AGAIN_SECONDS:
                question.sent_at = now
                self._to_ask.append(question.message)

    def loader_started(self, now: float) -> None:
        """Its predecessor answers nothing more."""
        for question in self._questions.values():
            question.sent_at = now
            self._to_ask.append(question.message)

    def cancel(self, request_id: int) -> None:
        self._waiting.pop(request_id, None)

    def forget_frontend(self, frontend: int) -> None:
        """Nobody waits for its prompts any more."""
        for request_id in [one for one in self._waiting if one >> REQUEST_BITS == frontend]:
            self.cancel(request_id)

    def take_ready(self) -> list[Ready]:
        """Prompts that have waited, with what holds for them, or why they cannot be served."""
        ready, self._ready = self._ready, []
        return ready

    def take_questions(self) -> list[AskTexts]:
        """For the adapter loader."""
        questions, self._to_ask = self._to_ask, []
        return questions

    def take_comparisons(self) -> list[ToCompare]:
        """To be compared beside all this; each is answered by `compared`."""
        comparisons, self._to_compare = self._to_compare, []
        return comparisons

    def _ask(self, key: AdapterKey, token: str | None, now: float) -> None:
        if key in self._questions:
            return
        known = self._known.get(key)
        self._count += 1
        message = AskTexts(
            question_id=self._count,
            worker=self._worker,
            adapter=key,
            adapter_token=token,
            known="" if known is None else known.version,
            known_tokenizers=(self._base_tokenizer, *list(self._verdicts)[-TOLD_VERDICTS:]),
        )
        self._questions[key] = _Question(message, now, now)
        self._to_ask.append(message)

    def _has_room(self, tokenizer: str) -> bool:
        """Whether it is known, or may be compared."""
        if self._verdict(tokenizer) is not None or tokenizer in self._comparing:
            return True
        return len(self._comparing) < MAX_COMPARING

    def _keep(
        self, key: AdapterKey, answer: AdapterTexts, files: Mapping[str, bytes], asked_at: float
    ) -> None:
        """What has been read of it; of too much, what was used least recently goes."""
        self._drop(key)
        tokenizer = answer.tokenizer
        difference = self._verdict(tokenizer)
        if difference is None and tokenizer not in self._comparing:
            if TOKENIZER_FILE not in files:  # the verdict was kept when it was asked, not so long
                return
            self._comparing.add(tokenizer)
            self._to_compare.append(ToCompare(tokenizer, files[TOKENIZER_FILE]))
        texts = self._read({name: files[name] for name in files if name != TOKENIZER_FILE})
        self._known[key] = _Known(answer.version, texts, tokenizer, difference, asked_at)
        self._characters += texts.characters
        while len(self._known) > MAX_KNOWN or self._characters > MAX_CHARACTERS:
            self._drop(next(iter(self._known)))

    def _drop(self, key: AdapterKey) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._characters -= known.texts.characters

    def _verdict(self, tokenizer: str) -> str | None:
        """How it differs; None if nobody knows."""
        if tokenizer in ("", self._base_tokenizer):
            return ""
        if tokenizer in self._verdicts:
            self._verdicts.move_to_end(tokenizer)
        return self._verdicts.get(tokenizer)

    def _texts(self, adapter: AdapterKey, since: Mapping[AdapterKey, float]) -> OwnTexts | None:
        """What holds for it, if that was asked late enough; None while that is not known."""
        found = []
        for key in adapter.parts:
            known = self._known.get(key)
            if known is None or known.difference is None or known.asked_at < since[key]:
                return None
            self._known.move_to_end(key)
            problem = known.texts.problem
            if known.difference:
                problem = disagreement(f"tokenizer.json disagrees: {known.difference}")
            if problem:
                return OwnTexts(problem=_about(adapter, key, problem))
            found.append(known.texts)
        return found[0] if all(one == found[0] for one in found) else NOTHING

    def _not_had(self, key: AdapterKey, known: _Known | None, failure: Failure, now: float) -> None:
        """Its source does not say. What is known holds on where nobody can be asked."""
        if known is not None and failure.kind is FailureKind.ADAPTER_UNAVAILABLE:
            known.asked_at = max(known.asked_at, now - self._revalidate_seconds / 2)
            for waiting in self._waiting.values():
                if key in waiting.since:
                    waiting.since[key] = min(waiting.since[key], known.asked_at)
            return
        self._drop(key)
        for request_id, waiting in list(self._waiting.items()):
            adapter = waiting.prompt.adapter
            if adapter is not None and key in waiting.since:
                self._fail(request_id, adapter, failure, key)

    def _fail(
        self, request_id: int, adapter: AdapterKey, failure: Failure, part: AdapterKey | None = None
    ) -> None:
        sentence = _about(adapter, part or adapter, failure.message)
        error = RequestError(failure.status, failure.kind, sentence)
        self._ready.append((self._waiting.pop(request_id).prompt, error))

    def _release(self, now: float) -> None:
        """Those that have heard all that they wait for; what others wait for is being asked."""
        for request_id, waiting in list(self._waiting.items()):
            adapter = waiting.prompt.adapter
            assert adapter is not None
            texts = self._texts(adapter, waiting.since)
            if texts is not None:
                del self._waiting[request_id]
                self._ready.append((waiting.prompt, texts))
                continue
            for key, since in waiting.since.items():
                known = self._known.get(key)
                if known is None or known.asked_at < since:
                    self._ask(key, waiting.prompt.adapter_token, now)


def refusal(texts: OwnTexts) -> RequestError:
    """Of texts that have a problem."""
    return RequestError(422, FailureKind.ADAPTER_INVALID, texts.problem)


def _about(adapter: AdapterKey, part: AdapterKey, sentence: str) -> str:
    """As the loader's failures begin."""
    named = f"part {part.id}: " if part != adapter else ""
    return f"adapter {adapter.id}: {named}{sentence}"
