"""Which grammars the GPU worker has compiled, and who waits for one: pure.

A sequence with a grammar starts only once the worker has compiled it, so that nobody else's step
waits for that. Compiled ones stay for those to come, the latest used of them.
"""

from collections.abc import Callable

from pipeline.messages import CompileGrammar
from scheduler.sequence import Sequence

MAX_IDLE = 64  # grammars that are kept while no sequence has them


class _Grammar:
    __slots__ = ("grammar_id", "is_compiled", "users", "waiting")

    def __init__(self, grammar_id: int) -> None:
        self.grammar_id = grammar_id
        self.is_compiled = False
        self.users = 0  # sequences that have it and have not ended
        self.waiting: list[Sequence] = []


class Grammars:
    """All of them, by what they are.

    send   a message to the worker
    """

    def __init__(self, send: Callable[[CompileGrammar], None]) -> None:
        self._send = send
        self._grammar_of: dict[str, _Grammar] = {}  # the latest used last
        self._source_of: dict[int, str] = {}
        self._given = 0  # ids
        self._worker_is_ready = False

    def worker_ready(self) -> None:
        """A worker that has compiled nothing yet."""
        self._worker_is_ready = True
        for grammar_id, source in self._source_of.items():
            self._send(CompileGrammar(grammar_id, source))

    def worker_lost(self) -> None:
        """Nothing is compiled any more: those that were not to wait are to `wait` again."""
        self._worker_is_ready = False
        for source, grammar in list(self._grammar_of.items()):
            grammar.is_compiled = False
            if not grammar.users:
                del self._grammar_of[source]
                del self._source_of[grammar.grammar_id]

    def join(self, sequence: Sequence) -> bool:
        """A new sequence: whether it may start. If not, it waits, and `compiled` gives it back."""
        self.share(sequence)
        return self.wait(sequence)

    def share(self, sequence: Sequence) -> None:
        """A new sequence that starts after another which has joined with the same grammar."""
        if not sequence.grammar:
            return
        grammar = self._grammar_of.pop(sequence.grammar, None)
        if grammar is None:
            grammar = self._ask_for(sequence.grammar)
        self._grammar_of[sequence.grammar] = grammar
        grammar.users += 1
        sequence.grammar_id = grammar.grammar_id

    def wait(self, sequence: Sequence) -> bool:
        """Whether one that is known here may start; see join."""
        if not sequence.grammar:
            return True
        grammar = self._grammar_of[sequence.grammar]
        if not grammar.is_compiled:
            grammar.waiting.append(sequence)
        return grammar.is_compiled

    def waits(self, sequence: Sequence) -> bool:
        """Whether it waits here."""
        return sequence in self._grammar_of[sequence.grammar].waiting

    def compiled(self, grammar_id: int) -> list[Sequence]:
        """The worker has it: those that waited for it may start."""
        source = self._source_of.get(grammar_id)
        if source is None:
            return []
        grammar = self._grammar_of[source]
        grammar.is_compiled = True
        waited, grammar.waiting = grammar.waiting, []
        return waited

    def failed(self, grammar_id: int) -> list[Sequence]:
        """The worker cannot have it: those that wait for it, who are to `leave`. Whoever comes
        after that has it tried again."""
        source = self._source_of.pop(grammar_id, None)
        if source is None:
            return []
        grammar = self._grammar_of[source]
        if not grammar.users:  # else it goes with the last of them
            del self._grammar_of[source]
        return list(grammar.waiting)

    def leave(self, sequence: Sequence) -> bool:
        """The sequence has ended. Whether it waited for its grammar until now."""
        if not sequence.grammar:
            return False
        grammar = self._grammar_of[sequence.grammar]
        grammar.users -= 1
        if not grammar.users and grammar.grammar_id not in self._source_of:
            del self._grammar_of[sequence.grammar]  # it failed
        if sequence not in grammar.waiting:
            return False
        grammar.waiting.remove(sequence)
        return True

    def _ask_for(self, source: str) -> _Grammar:
        self._given += 1
        grammar = _Grammar(self._given)
        self._source_of[grammar.grammar_id] = source
        forgotten = self._forget()
        if self._worker_is_ready:
            self._send(CompileGrammar(grammar.grammar_id, source, forgotten))
        return grammar

    def _forget(self) -> tuple[int, ...]:
        """All but the latest of those that nobody has; gives their ids."""
        idle = [source for source, grammar in self._grammar_of.items() if not grammar.users]
        dropped = [self._grammar_of.pop(source) for source in idle[: max(0, len(idle) - MAX_IDLE)]]
        for grammar in dropped:
            del self._source_of[grammar.grammar_id]
        return tuple(grammar.grammar_id for grammar in dropped)
