"""Which grammars are known to be good, and the prompts that wait to hear it of theirs: pure."""

from collections.abc import Iterator

from pipeline.errors import RequestError
from pipeline.messages import REQUEST_BITS, FailureKind, GrammarChecked, Prompt
from tokenizer_workers.encode import Encoded

MAX_KNOWN = 256

Waiting = list[tuple[Prompt, Encoded]]


class CheckedGrammars:
    """Grammars by what they are; its length is the number of prompts that wait."""

    def __init__(self) -> None:
        self._errors: dict[str, str] = {}  # of grammars that were compiled; the latest used last
        self._waiting: dict[str, Waiting] = {}  # for grammars that are being compiled
        self._to_compile: list[str] = []

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def may_be_used(self, prompt: Prompt, encoded: Encoded) -> bool:
        """Whether the prompt's grammar is good. If nobody knows yet, the prompt waits, and
        `checked` gives it back. Raises RequestError for one that is not."""
        source = encoded.grammar
        error = self._errors.pop(source, None)
        if error is None:
            if source not in self._waiting:
                self._waiting[source] = []
                self._to_compile.append(source)
            self._waiting[source].append((prompt, encoded))
            return False
        self._errors[source] = error
        if error:
            raise RequestError(422, FailureKind.GRAMMAR, error)
        return True

    def take(self) -> list[str]:
        """What is to be compiled."""
        sources, self._to_compile = self._to_compile, []
        return sources

    def checked(self, message: GrammarChecked) -> Waiting:
        """It was compiled, or cannot be: who waited for it."""
        self._errors[message.source] = message.error
        if len(self._errors) > MAX_KNOWN:
            del self._errors[next(iter(self._errors))]
        return self._waiting.pop(message.source, [])

    def cancel(self, request_id: int) -> None:
        for waiting in self._waiting.values():
            waiting[:] = [one for one in waiting if one[0].request_id != request_id]

    def forget(self, frontend: int) -> None:
        """Nobody waits for its prompts any more."""
        for request_id in list(self._of(frontend)):
            self.cancel(request_id)

    def _of(self, frontend: int) -> Iterator[int]:
        for waiting in self._waiting.values():
            for prompt, _ in waiting:
                if prompt.request_id >> REQUEST_BITS == frontend:
                    yield prompt.request_id
