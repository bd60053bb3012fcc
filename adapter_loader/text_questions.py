"""Which files for tokenizers are read, and who wants to know what is in them: pure.

    ask -> StartTexts -> fetched or failed -> AdapterTexts, one for each question

Questions about one adapter that come while its files are read wait for the same reading. As with
loads, a remote adapter's failure is remembered for a short time, by its whole key.
"""

from dataclasses import dataclass, field

import msgspec

from adapter_loader.recent_failures import RecentFailures
from adapter_loader.texts import TOKENIZER_FILE, Texts
from pipeline.messages import AdapterKey, AdapterTexts, AskTexts, Failure, ForgetTexts

Place = tuple[AdapterKey, str]  # and the version that is known


@dataclass(frozen=True, slots=True)
class StartTexts:
    """Read the files of the adapter, and report fetched or failed with this number."""

    number: int
    key: AdapterKey
    token: str | None = field(repr=False)
    known: str  # report None when they are of this version


class ToWorker(msgspec.Struct, frozen=True):
    """A message and the tokenizer worker that it is for."""

    worker: int
    message: AdapterTexts | ForgetTexts


@dataclass(slots=True)
class _Reading:
    place: Place
    questions: dict[tuple[int, int], AskTexts]  # by worker and question


class TextQuestions:
    """remember_seconds and `now` as of Core; workers is how many tokenizer workers there are."""

    def __init__(self, *, workers: int, remember_seconds: float) -> None:
        self._workers = workers
        self._failures = RecentFailures(remember_seconds)
        self._readings: dict[int, _Reading] = {}
        self._open: dict[Place, int] = {}  # readings that may be waited for
        self._count = 0
        self._actions: list[StartTexts] = []
        self._outbox: list[ToWorker] = []

    def ask(self, question: AskTexts, now: float) -> None:
        reason = self._failures.find(question.adapter, now)
        if reason is not None:
            self._answer(question, failure=reason)
            return
        place = (question.adapter, question.known)
        number = self._open.get(place)
        if number is None:
            number = self._open[place] = self._count
            self._count += 1
            self._readings[number] = _Reading(place, {})
            token = question.adapter_token
            self._actions.append(StartTexts(number, question.adapter, token, question.known))
        self._readings[number].questions[question.worker, question.question_id] = question

    def fetched(self, number: int, texts: Texts | None) -> None:
        """What there is, or None: the version is the known one."""
        for question in self._end(number).questions.values():
            if texts is None:
                self._answer(question, version=question.known)
                continue
            files = dict(texts.files)
            if texts.tokenizer in question.known_tokenizers:
                files.pop(TOKENIZER_FILE, None)
            self._answer(question, version=texts.version, files=files, tokenizer=texts.tokenizer)

    def failed(self, number: int, reason: Failure, now: float) -> None:
        """They cannot be had."""
        reading = self._end(number)
        key, _ = reading.place
        if key.source != "local":  # a folder is mended by its owner
            self._failures.add(key, reason, now)
        for question in reading.questions.values():
            self._answer(question, failure=reason)

    def forget(self, key: AdapterKey) -> None:
        """Whatever is asked from now on is read from now on."""
        self._failures.forget(key)
        for place in [place for place in self._open if place[0] == key]:
            del self._open[place]
        self._outbox += [ToWorker(worker, ForgetTexts(key)) for worker in range(self._workers)]

    def take_actions(self) -> list[StartTexts]:
        actions, self._actions = self._actions, []
        return actions

    def take_outbox(self) -> list[ToWorker]:
        outbox, self._outbox = self._outbox, []
        return outbox

    def _end(self, number: int) -> _Reading:
        reading = self._readings.pop(number)
        if self._open.get(reading.place) == number:
            del self._open[reading.place]
        return reading

    def _answer(
        self,
        question: AskTexts,
        *,
        version: str = "",
        files: dict[str, bytes] | None = None,
        tokenizer: str = "",
        failure: Failure | None = None,
    ) -> None:
        message = AdapterTexts(
            question.question_id, question.adapter, version, files, tokenizer, failure
        )
        self._outbox.append(ToWorker(question.worker, message))
