"""A worker on a tiny model, and a hand that drives it with steps as a scheduler would."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.logprobs import split, unpack
from pipeline.messages import (
    AdapterCopy,
    Logprobs,
    NewRow,
    PlaceAdapter,
    Pooling,
    Sampling,
    Step,
    StepDone,
)

GREEDY = Sampling(temperature=0.0)
BLOCK_TOKENS = 4
ROWS = 8


def ints(values: Iterable[object]) -> bytes:
    return np.asarray(list(values), np.int32).tobytes()


def make_worker(folder: Path, **settings: object) -> Worker:
    """Small blocks, so that a short sequence has several."""
    defaults: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "gpu_threads": 1,
        "kv_block_tokens": BLOCK_TOKENS,
        "kv_cache_bytes": 4 << 20,
        "adapter_pool_bytes": 4 << 20,
        "rows": ROWS,
    }
    made = Settings(**{**defaults, **settings})  # type: ignore[arg-type]
    return build_worker(made, folder, Figures(CollectorRegistry())).worker


class Row:
    """What a scheduler knows of a row."""

    def __init__(self, new: NewRow, tokens: list[int], blocks: list[int]) -> None:
        self.new = new
        self.tokens = tokens
        self.given = len(tokens)  # known to the worker before it produced any here
        self.computed = new.cached_tokens  # tokens whose KV is in the blocks
        self.blocks = blocks
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []  # of what it produced
        self.prompt_logprobs: list[tuple[float, list[tuple[int, float]]]] = []

    @property
    def produced(self) -> list[int]:
        return self.tokens[self.new.prompt_tokens :]


class Result(NamedTuple):
    tokens: dict[int, int]  # by row
    done: StepDone


class Driver:
    """Keeps rows and blocks; each call of `step` is one Step."""

    def __init__(
        self,
        worker: Worker,
        *,
        blocks: Sequence[int] = range(200),
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.worker = worker
        self.free_blocks = list(blocks)
        self.rows: dict[int, Row] = {}
        self._block_tokens = block_tokens
        self._steps = 0
        self._new: list[NewRow] = []
        self._freed: list[int] = []
        self._appended: list[tuple[int, int]] = []

    def add(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        slot: int = -1,
        sampling: Sampling = GREEDY,
        prompt_tokens: int | None = None,
        cached_blocks: Sequence[int] = (),
        logprobs: Logprobs | None = None,
        end_token_ids: tuple[int, ...] = (),
        grammar_id: int = 0,
        pooling: Pooling | None = None,
    ) -> Row:
        """A sequence takes a row in the next step."""
        new = NewRow(
            row=row,
            slot=slot,
            token_ids=ints(tokens),
            prompt_tokens=len(tokens) if prompt_tokens is None else prompt_tokens,
            cached_tokens=len(cached_blocks) * self._block_tokens,
            blocks=ints(cached_blocks),
            sampling=sampling,
            logprobs=logprobs,
            end_token_ids=end_token_ids,
            grammar_id=grammar_id,
            pooling=pooling,
        )
        self._new.append(new)
        self.rows[row] = Row(new, list(tokens), list(cached_blocks))
        return self.rows[row]

    def free(self, row: int, *, keep_blocks: bool = False) -> Row:
        """The row is free from the next step on; its blocks, at once."""
        freed = self.rows.pop(row)
        self._freed.append(row)
        if not keep_blocks:
            self.free_blocks += freed.blocks
        return freed

    def step(
        self,
        *,
        decode: Sequence[int] = (),
        prefill: Sequence[tuple[int, int]] = (),
        copies: tuple[AdapterCopy, ...] = (),
    ) -> Result:
        """prefill is (row, tokens), decode rows are those whose last token was sampled. The
        adapters of `copies` are placed just before."""
        for copy in copies:
            self.worker.place(PlaceAdapter(copy))
        chunks = [(row, self.rows[row].computed, count) for row, count in prefill]
        for row, fed in [*((row, 1) for row in decode), *prefill]:
            self._feed(self.rows[row], row, fed)
        self._steps += 1
        done = self.worker.run(
            Step(
                step_id=self._steps,
                decode_rows=ints(decode),
                prefill=np.asarray(chunks, np.int32).tobytes(),
                block_rows=ints(row for row, _ in self._appended),
                blocks=ints(block for _, block in self._appended),
                free_rows=ints(self._freed),
                new_rows=tuple(self._new),
            )
        )
        self._new, self._freed, self._appended = [], [], []
        assert done.step_id == self._steps
        return Result(self._receive(decode, prefill, done), done)

    def _feed(self, state: Row, row: int, count: int) -> None:
        state.computed += count
        assert state.computed <= len(state.tokens)
        while len(state.blocks) * self._block_tokens < state.computed:
            block = self.free_blocks.pop()
            state.blocks.append(block)
            self._appended.append((row, block))

    def _receive(
        self, decode: Sequence[int], prefill: Sequence[tuple[int, int]], done: StepDone
    ) -> dict[int, int]:
        ended = [
            row
            for row, _ in prefill
            if self.rows[row].computed == len(self.rows[row].tokens)
            and self.rows[row].new.pooling is None
        ]
        rows = [*decode, *ended]
        tokens = np.frombuffer(done.token_ids, np.int32).tolist()
        for row, token in zip(rows, tokens, strict=True):
            self.rows[row].tokens.append(token)
        self._receive_logprobs(rows, prefill, done)
        return dict(zip(rows, tokens, strict=True))

    def _receive_logprobs(
        self, sampled: Sequence[int], prefill: Sequence[tuple[int, int]], done: StepDone
    ) -> None:
        wanting = [self.rows[row] for row in sampled if self.rows[row].new.logprobs]
        scored = []
        for row, count in prefill:
            state = self.rows[row]
            wanted = state.new.logprobs
            if wanted is not None and wanted.prompt_top is not None:
                start = state.computed - count
                scored += [state] * max(0, min(count, state.new.prompt_tokens - 1 - start))
        rows = split(done.logprobs, len(wanting) + len(scored))
        for state, row_bytes in zip(wanting, rows, strict=False):
            assert state.new.logprobs is not None
            state.logprobs.append(unpack(row_bytes, state.new.logprobs.top))
        for state, row_bytes in zip(scored, rows[len(wanting) :], strict=True):
            assert state.new.logprobs is not None
            top = state.new.logprobs.prompt_top or 0
            state.prompt_logprobs.append(unpack(row_bytes, top))

    def prefill_all(self, rows: Sequence[int]) -> Result:
        """Feed everything that these rows have not fed."""
        return self.step(
            prefill=[(row, len(self.rows[row].tokens) - self.rows[row].computed) for row in rows]
        )

    def generate(self, rows: Sequence[int], count: int) -> None:
        """Prefill the rows at once, and decode until each has `count` more tokens."""
        self.prefill_all(rows)
        for _ in range(count - 1):
            self.step(decode=rows)


def prompt(seed: int, length: int, vocabulary: int = 160) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()
