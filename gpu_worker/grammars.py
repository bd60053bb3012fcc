"""Grammars of rows: matchers that advance beside the steps, and the masks that they fill.

Two threads. One compiles, which may take long; rows name a grammar only afterwards. The other has
the matchers: while the forward pass of a step runs it waits for the tokens of the step before,
lets the matchers read them, and fills the masks, so that they are ready when sampling wants them.
The thread that steps leaves jobs for both and waits for neither.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.device import to_device
from gpu_worker.pinned import PinnedRing
from pipeline.grammars import GrammarError, compile_grammar
from pipeline.messages import CompileGrammar, GrammarCompiled, NewRow

WORD = 32  # tokens in a word of a mask
MASKS_IN_USE = 3  # of steps: one on the device, one launched, one that is filled
MAX_SPARE = 16  # matchers of a grammar that are kept for rows to come, with what they have learnt

Job = Callable[[], None]
log = logging.getLogger(__name__)


class Sampled(Protocol):
    """A step that has been sampled."""

    def tokens_on_host(self) -> NDArray[np.int32]:
        """One for each of its sampled rows; waits until they are there."""
        ...


class Masks:
    """What those rows of a step that have a grammar may be given.

    positions  int64[n], among the rows that the step samples
    words      int32[n, words] in host memory: a bit for each token
    """

    def __init__(self, rows: NDArray[np.int64], positions: NDArray[np.int64], words: Tensor):
        self.rows = rows
        self.positions = positions
        self.words = words
        self.gave_up: list[int] = []  # positions of rows that no token can be found for
        self._filled = threading.Event()

    @property
    def is_ready(self) -> bool:
        return self._filled.is_set()

    def wait(self) -> None:
        self._filled.wait()

    def filled(self) -> None:
        self._filled.set()

    def apply(self, logits: Tensor) -> Tensor:
        """[sampled, vocabulary], a copy with -inf where a token may not follow. Does not wait for
        the device, which reads `words` on its way."""
        device = logits.device
        bits = 1 << torch.arange(8, dtype=torch.uint8, device=device)
        octets = self.words.to(device, non_blocking=True).view(torch.uint8)
        forbidden = (octets[:, :, None] & bits).eq_(0).view(len(octets), -1).bool()
        at = to_device(self.positions, device)
        masked = logits[at].masked_fill_(forbidden[:, : logits.shape[1]], float("-inf"))
        return logits.index_copy(0, at, masked)


class _Row:
    """A row's matcher, until its reply is over."""

    __slots__ = ("gave_up", "grammar_id", "is_over", "matcher")

    def __init__(self, grammar_id: int, matcher: LLMatcher) -> None:
        self.grammar_id = grammar_id
        self.matcher = matcher
        self.is_over = False  # its end was sampled: what is sampled behind it is dropped
        self.gave_up = False


class Grammars:
    """Owns both threads, and with them compiled grammars, matchers and masks.

    load_vocabulary  called in a thread when a grammar comes; raises GrammarError
    rows             of the row table
    vocabulary       tokens of the model
    threads          that fill masks
    """

    def __init__(
        self,
        *,
        load_vocabulary: Callable[[], LLTokenizer],
        rows: int,
        vocabulary: int,
        eos_token_ids: tuple[int, ...],
        threads: int,
    ) -> None:
        self._load_vocabulary = load_vocabulary
        self.eos_token_ids = frozenset(eos_token_ids)
        self._threads = threads
        self._words = -(-vocabulary // WORD)
        self._ring = PinnedRing(buffers=MASKS_IN_USE, shape=(rows, self._words), dtype=np.int32)
        self._has_grammar = np.zeros(rows, np.bool_)  # the thread that steps alone reads it
        self._answers: deque[GrammarCompiled] = deque()
        self._compiled: dict[int, LLMatcher] = {}  # at their beginning
        self._compiling: SimpleQueue[Job | None] = SimpleQueue()
        self._matching: SimpleQueue[Job | None] = SimpleQueue()
        self._started = False
        self._asked = self._answered = 0  # compilations
        self._vocabulary: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        # of the thread that has the matchers
        self._rows: dict[int, _Row] = {}
        self._spare: dict[int, list[LLMatcher]] = {}
        self._wide = np.zeros((0, 0), np.int32)

    # --- called by the thread that steps ---

    def compile(self, message: CompileGrammar) -> None:
        """Answered by one of `compiled`, some time later."""
        if not self._started:
            self._started = True
            for jobs in (self._compiling, self._matching):
                threading.Thread(target=_work, args=(jobs,), daemon=True).start()
        self._asked += 1
        self._matching.put(partial(self._forget, message.forget))
        self._compiling.put(partial(self._compile, message))

    @property
    def is_compiling(self) -> bool:
        """Whether `compiled` will give more."""
        return self._asked > self._answered

    def compiled(self) -> list[GrammarCompiled]:
        """What has been compiled since the last call, or failed to be."""
        answers = []
        while self._answers:
            answers.append(self._answers.popleft())
        self._answered += len(answers)
        return answers

    def take(self, new: NewRow) -> None:
        """A sequence takes a row: from now on it follows its grammar, if it has one."""
        if new.grammar_id or self._has_grammar[new.row]:
            self._has_grammar[new.row] = bool(new.grammar_id)
            produced = np.frombuffer(new.token_ids, np.int32)[new.prompt_tokens :].tolist()
            self._matching.put(partial(self._take, new.row, new.grammar_id, produced))

    def fill(self, rows: NDArray[np.int64]) -> Masks | None:
        """Masks for the rows that are sampled next, if one of them has a grammar. Comes after
        `advance` for the step before."""
        positions = np.flatnonzero(self._has_grammar[rows])
        if not len(positions):
            return None
        masks = Masks(rows[positions], positions, self._ring.next()[: len(positions)])
        self._matching.put(partial(self._fill, masks))
        return masks

    def advance(self, masks: Masks, sampled: Sampled) -> None:
        """The rows of these masks have got tokens, which may be still on their way."""
        self._matching.put(partial(self._advance, masks, sampled))

    def close(self) -> None:
        """End both threads, once they have done what they were given."""
        self._compiling.put(None)
        self._matching.put(None)

    # --- called by the thread that compiles ---

    def _compile(self, message: CompileGrammar) -> None:
        try:
            if self._vocabulary is None:
                self._vocabulary = self._load_vocabulary()
            self._compiled[message.grammar_id] = compile_grammar(self._vocabulary, message.source)
        except GrammarError as error:
            self._answers.append(GrammarCompiled(message.grammar_id, str(error)))
        else:
            self._answers.append(GrammarCompiled(message.grammar_id))

    # --- called by the thread that has the matchers ---

    def _forget(self, grammar_ids: tuple[int, ...]) -> None:
        for grammar_id in grammar_ids:
            self._compiled.pop(grammar_id, None)
            self._spare.pop(grammar_id, None)

    def _take(self, row: int, grammar_id: int, produced: list[int]) -> None:
        before = self._rows.pop(row, None)
        if before is not None and not before.gave_up and before.grammar_id in self._compiled:
            spare = self._spare.setdefault(before.grammar_id, [])
            if len(spare) < MAX_SPARE and before.matcher.reset():
                spare.append(before.matcher)
        if not grammar_id:
            return
        spare = self._spare.get(grammar_id, [])
        matcher = spare.pop() if spare else self._compiled[grammar_id].deep_copy()
        self._rows[row] = now = _Row(grammar_id, matcher)
        now.gave_up = not matcher.consume_tokens(produced)

    def _advance(self, masks: Masks, sampled: Sampled) -> None:
        tokens = sampled.tokens_on_host()[masks.positions].tolist()
        for index, token in zip(masks.rows.tolist(), tokens, strict=True):
            row = self._rows[index]
            if row.is_over or row.gave_up:
                continue
            if token in self.eos_token_ids or token < 0:
                row.is_over = True
            else:
                row.gave_up = not row.matcher.consume_token(token)

    def _fill(self, masks: Masks) -> None:
        rows = [self._rows[row] for row in masks.rows.tolist()]
        wanted = [
            (row.matcher, at) for at, row in enumerate(rows) if not (row.is_over or row.gave_up)
        ]
        words = masks.words.numpy()
        words[:] = -1
        self._compute(wanted, words)
        for at, row in enumerate(rows):
            row.gave_up = row.gave_up or (not row.is_over and row.matcher.is_error())
            if row.gave_up:
                words[at] = -1
                masks.gave_up.append(int(masks.positions[at]))
        masks.filled()

    def _compute(self, wanted: list[tuple[LLMatcher, int]], words: NDArray[np.int32]) -> None:
        """Each matcher's mask into its row of words."""
        if not wanted:
            return
        assert self._vocabulary is not None
        own = -(-self._vocabulary.vocab_size // WORD)
        into = words
        if own != words.shape[1]:  # tokens that the model has no logits for
            if len(self._wide) < len(words):
                self._wide = np.zeros((len(words), own), np.int32)
            into = self._wide
        if self._executor is None:
            self._executor = LLExecutor(self._threads)
        self._executor.unsafe_compute_mask_ptr(wanted, into.ctypes.data, own * 4, len(into))
        if into is not words:
            for _, at in wanted:
                words[at] = into[at, : words.shape[1]]


def _work(jobs: "SimpleQueue[Job | None]") -> None:
    """Without this thread steps would wait for ever, so its errors are the process's."""
    try:
        while (job := jobs.get()) is not None:
            job()
    except BaseException:
        log.exception("event=grammar_thread_died")
        os._exit(1)
