"""A GPU worker without a GPU: it does what steps say, and fails the test where they make no sense.

Its model's next token is a function of the adapter and of all tokens before, as they are stored in
the KV blocks of the row's page table. So a wrong block, position, chunk or adapter gives another
token than `reply`, which is what an undisturbed run gives.
"""

import math
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import msgspec

from pipeline.logprobs import pack
from pipeline.messages import (
    AdapterCopy,
    AdapterMove,
    AdapterPlaced,
    NewRow,
    PlaceAdapter,
    Pooling,
    PoolingKind,
    Step,
    StepDone,
    WorkerReady,
)

VOCABULARY = 17
EOS = 0
BASE = "base"  # the content of a row without adapter
BROKEN = "broken"  # a content that gives logits that are not finite


def next_token(content: str, token_ids: Sequence[int]) -> int:
    if content == BROKEN:
        return -1
    return zlib.crc32(array("i", token_ids).tobytes(), zlib.crc32(content.encode())) % VOCABULARY


def reply(
    content: str, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False
) -> list[int]:
    """What a request gives when nothing else happens."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        token_ids.append(next_token(content, token_ids))
        if token_ids[-1] == EOS and not ignore_eos:
            break
    return token_ids[len(prompt) :]


def embedding(content: str, prompt: Sequence[int], pooling: Pooling) -> bytes:
    """What a prompt is embedded as."""
    if content == BROKEN:
        return array("f", [math.nan, math.nan]).tobytes()
    token = next_token(content, prompt)
    return array("f", [token, pooling.kind is PoolingKind.MEAN]).tobytes()


def unpack(numbers: bytes) -> list[int]:
    return array("i", numbers).tolist()


def logprob_row(token: int) -> bytes:
    """What is said of a token, wherever it stands."""
    return pack(-float(token), [(token, -float(token))])


def _logprob(row: "Row", token: int) -> bytes:
    return b"" if row.logprobs is None else logprob_row(token)


def _scored(row: "Row", start: int, count: int) -> bytes:
    if row.logprobs is None or row.logprobs.prompt_top is None:
        return b""
    scored = row.token_ids[start + 1 : start + 1 + count]
    return b"".join(map(logprob_row, scored[: max(0, row.prompt_tokens - 1 - start)]))


class Row:
    def __init__(self, new: NewRow, content: str) -> None:
        self.slot = new.slot
        self.content = content
        self.token_ids = unpack(new.token_ids)
        self.blocks = unpack(new.blocks)
        self.position = new.cached_tokens  # the next to be fed
        self.last_token: int | None = None
        self.prompt_tokens = new.prompt_tokens
        self.logprobs = new.logprobs
        self.pooling = new.pooling
        self.pooled: list[int] = []  # tokens whose states a mean is made of


class FakeWorker:
    """It overwrites the pool as soon as it is told to, and reads the arena as late as it may.

    arena  content by arena offset, as the loader leases it
    """

    def __init__(
        self,
        *,
        arena: Mapping[int, str],
        rows: int = 4,
        kv_blocks: int = 32,
        block_tokens: int = 4,
        pool_bytes: int = 4096,
        slots: int = 8,
        step_tokens: int = 16,
        chunk_tokens: int = 16,
    ) -> None:
        self.ready = WorkerReady(
            kv_blocks, block_tokens, pool_bytes, slots, rows, step_tokens=step_tokens
        )
        self.steps: deque[Step] = deque()  # sent, not run
        self.run_steps: list[Step] = []
        self.placing: deque[PlaceAdapter] = deque()  # sent, not done
        self.placements: list[PlaceAdapter] = []  # all that were sent
        self.compiled = {0}  # ids of grammars
        self._arena = arena
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens
        self._rows: dict[int, Row] = {}
        self._kv: dict[tuple[int, int], tuple[str, int]] = {}  # (block, place): content, token
        self._copies: dict[int, AdapterCopy] = {}  # by slot; what still lies in the pool
        self._content_of: dict[int, str] = {-1: BASE}  # by slot
        self._filled_after: dict[int, int] = {}  # by slot: steps that were sent before
        self._sampled_rows: list[Row] = []  # of the step that runs

    def send(self, step: Step) -> None:
        self.steps.append(step)
        assert len(self.steps) <= 2, "too many steps in flight"

    def place(self, message: PlaceAdapter) -> None:
        self.placing.append(message)
        self.placements.append(message)
        for move in message.moves:
            self._move(move)
        self._copy(message.copy)

    def placed(self) -> AdapterPlaced:
        """The oldest placement ends."""
        copy = self.placing.popleft().copy
        assert self._content_of[copy.slot] == self._arena[copy.arena_offset], "given away too soon"
        return AdapterPlaced(copy.slot)

    def run(self) -> StepDone:
        """Run the oldest step that was sent."""
        step = self.steps.popleft()
        if self.run_steps:
            assert step.step_id == self.run_steps[-1].step_id + 1
        self.run_steps.append(step)
        self._change_rows(step)
        decode_rows = unpack(step.decode_rows)
        numbers = unpack(step.prefill)
        chunks = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        assert max(Counter(decode_rows + [row for row, _, _ in chunks]).values(), default=1) == 1
        assert len(decode_rows) + sum(count for _, _, count in chunks) <= self._step_tokens
        sampled = [self._decode(self._rows[number]) for number in decode_rows]
        self._sampled_rows = [self._rows[number] for number in decode_rows]
        for number, start, count in chunks:
            sampled += self._prefill(self._rows[number], start, count)
        logprobs = [
            _logprob(row, token) for row, token in zip(self._sampled_rows, sampled, strict=True)
        ]
        logprobs += [_scored(self._rows[number], *chunk) for number, *chunk in chunks]
        embeddings = [self._embedded(self._rows[number]) for number, *_ in chunks]
        return StepDone(
            step.step_id,
            array("i", sampled).tobytes(),
            b"".join(logprobs),
            embeddings=b"".join(embeddings),
        )

    def _change_rows(self, step: Step) -> None:
        for number in unpack(step.free_rows):
            del self._rows[number]
        for new in step.new_rows:
            self._add(new)
        for number, block in zip(unpack(step.block_rows), unpack(step.blocks), strict=True):
            self._check_unused([block])
            self._rows[number].blocks.append(block)

    def _move(self, move: AdapterMove) -> None:
        """What is said not to be in use, moves under the steps in flight."""
        copy = self._copies.pop(move.slot)
        assert copy.pool_offset == move.from_offset
        assert copy.nbytes <= move.nbytes
        assert move.to_offset < move.from_offset
        assert move.slot not in [placing.copy.slot for placing in list(self.placing)[:-1]]
        self._overwrite(move.to_offset, move.nbytes)
        self._copies[move.slot] = msgspec.structs.replace(copy, pool_offset=move.to_offset)
        if not move.in_use:
            self._filled_after[move.slot] = len(self.run_steps) + len(self.steps)

    def _copy(self, copy: AdapterCopy) -> None:
        assert 0 <= copy.slot < self.ready.adapter_slots
        self._copies.pop(copy.slot, None)
        self._overwrite(copy.pool_offset, copy.nbytes)
        self._copies[copy.slot] = copy
        self._filled_after[copy.slot] = len(self.run_steps) + len(self.steps)
        self._content_of[copy.slot] = self._arena[copy.arena_offset]

    def _overwrite(self, offset: int, nbytes: int) -> None:
        assert offset % 256 == 0
        assert 0 <= offset <= self.ready.adapter_pool_bytes - nbytes
        self._copies = {
            slot: other
            for slot, other in self._copies.items()
            if offset + nbytes <= other.pool_offset or other.pool_offset + other.nbytes <= offset
        }

    def _add(self, new: NewRow) -> None:
        assert new.row not in self._rows, "the row is taken"
        assert 0 <= new.row < self.ready.rows
        assert new.grammar_id in self.compiled, "the grammar is not compiled"
        row = Row(new, self._content_of[new.slot])
        assert new.cached_tokens < len(row.token_ids)
        assert new.cached_tokens % self.ready.block_tokens == 0
        known = self._history(row, new.cached_tokens)
        assert known == row.token_ids[: new.cached_tokens], "the cache has other tokens"
        self._check_unused(row.blocks[new.cached_tokens // self.ready.block_tokens :])
        assert len(set(row.blocks)) == len(row.blocks)
        self._rows[new.row] = row

    def _check_unused(self, blocks: list[int]) -> None:
        held = {block for row in self._rows.values() for block in row.blocks}
        assert held.isdisjoint(blocks), "a block that is to be written is held by another row"
        assert all(0 <= block < self.ready.kv_blocks for block in blocks)

    def _decode(self, row: Row) -> int:
        assert row.last_token is not None
        self._feed(row, row.last_token)
        return self._sample(row)

    def _prefill(self, row: Row, start: int, count: int) -> list[int]:
        assert 0 < count <= self._chunk_tokens
        assert start == row.position
        end = start + count
        assert end <= len(row.token_ids)
        for token in row.token_ids[start:end]:
            self._feed(row, token)
        row.pooled += row.token_ids[start:end]
        if end < len(row.token_ids) or row.pooling is not None:
            return []
        self._sampled_rows.append(row)
        return [self._sample(row)]

    def _embedded(self, row: Row) -> bytes:
        """After the last chunk of a row that wants it."""
        if row.pooling is None or row.position < len(row.token_ids):
            return b""
        known = self._history(row, row.position)
        if row.pooling.kind is PoolingKind.MEAN:
            assert row.pooled == known, "a token's state is missing"
        return embedding(row.content, known, row.pooling)

    def _feed(self, row: Row, token: int) -> None:
        self._check_adapter(row)
        index, place = divmod(row.position, self.ready.block_tokens)
        self._kv[row.blocks[index], place] = (row.content, token)
        row.position += 1

    def _sample(self, row: Row) -> int:
        row.last_token = next_token(row.content, self._history(row, row.position))
        return row.last_token

    def _history(self, row: Row, tokens: int) -> list[int]:
        size = self.ready.block_tokens
        stored = [self._kv[row.blocks[at // size], at % size] for at in range(tokens)]
        assert all(content == row.content for content, _ in stored), "KV of another adapter"
        return [token for _, token in stored]

    def _check_adapter(self, row: Row) -> None:
        if row.slot >= 0:
            assert row.slot in self._copies, "the adapter was overwritten while it was in use"
            assert self._content_of[row.slot] == row.content
            assert self._filled_after[row.slot] < len(self.run_steps), "filled under a step"
