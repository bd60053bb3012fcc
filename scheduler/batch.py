"""The running sequences: their rows, their KV blocks, and their part in each step."""

from bisect import insort

from pipeline.messages import NewRow
from scheduler.kv_blocks import KvBlocks
from scheduler.policy import by_order, discard
from scheduler.sequence import Sequence
from scheduler.step_plan import Scored, StepPlan, pack


class Batch:
    """Who runs, from the oldest to the latest. Rows are given again as soon as they are free; the
    worker is told of freed ones with the next step."""

    def __init__(self, *, rows: int, kv: KvBlocks, chunk_tokens: int, preemptions: int = 0) -> None:
        self.kv = kv
        self.preemptions = preemptions  # since the start
        self._chunk_tokens = chunk_tokens
        self._free_rows = list(range(rows - 1, -1, -1))
        self._rows_to_free: list[int] = []  # to be told to the worker
        self._running: list[Sequence] = []
        self._prefilling: list[Sequence] = []  # those of _running with chunks to go
        self._blocks_ran_out = False  # the next to start found too few, and none have come back

    def __len__(self) -> int:
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether it makes sense to try `start`."""
        return bool(self._free_rows) and not self._blocks_ran_out

    def someone_else_is_next(self) -> None:
        """Whoever found too few blocks is gone; the next may need fewer."""
        self._blocks_ran_out = False

    # --- parts of a step ---

    def decode(self, plan: StepPlan) -> list[Sequence]:
        """One token for each sequence whose prompt is done and that is not at its length.

        Returns whom it preempted for want of blocks: the latest, who gave up row and blocks.
        """
        preempted: list[Sequence] = []
        sampled = plan.sampled
        kv_tokens = 0
        for sequence in self._running:  # its tail may go meanwhile, never what has been passed
            fed = sequence.fed
            if fed >= sequence.decodes_to and not self._may_decode(sequence, plan, preempted):
                continue
            sequence.fed = fed + 1
            kv_tokens += fed
            sampled.append(sequence)
        plan.decode_rows = [sequence.row for sequence in sampled]
        plan.kv_tokens = kv_tokens
        self.preemptions += len(preempted)
        return preempted

    def continue_prefills(self, plan: StepPlan, budget: int) -> int:
        """Chunks for those that have started, within `budget` tokens; returns what is left."""
        for sequence in list(self._prefilling):
            if budget == 0:
                break
            budget -= self._prefill(sequence, plan, budget)
        return budget

    def start(self, sequence: Sequence, slot: int, plan: StepPlan, budget: int) -> int:
        """A row, blocks for all tokens and a first chunk; returns how many tokens that has.

        0 if there are too few blocks. One per running sequence is left over, so that nobody is
        preempted at once. `slot` is the adapter's, or -1.
        """
        root = (sequence.adapter, sequence.content)
        table = self.kv.open(
            root,
            sequence.token_ids,
            reserve=len(self._running),
            share=sequence.shareable_tokens,
        )
        if table is None:
            self._blocks_ran_out = True
            return 0
        sequence.table = table
        sequence.row = self._free_rows.pop()
        sequence.fed = self.kv.cached_tokens(table)
        sequence.prefill_end = len(sequence.token_ids)
        sequence.capacity = len(table.blocks) * self.kv.block_tokens
        sequence.decodes_to = 0
        sequence.notice_at = sequence.prefill_end + 1
        insort(self._running, sequence, key=by_order)
        insort(self._prefilling, sequence, key=by_order)
        plan.new_rows.append(_new_row(sequence, slot, table.blocks))
        return self._prefill(sequence, plan, budget)

    def seal(self, plan: StepPlan) -> list[int]:
        """The plan is complete: cache what its chunks write, for later steps, since a step cannot
        read what it writes itself. Returns the rows to free with it."""
        for sequence in plan.chunked:
            self.cache_written(sequence)
        rows, self._rows_to_free = self._rows_to_free, []
        return rows

    # --- after a step ---

    def cache_written(self, sequence: Sequence) -> None:
        """Cache the full blocks whose tokens are known and whose KV is written by steps sent."""
        assert sequence.table is not None
        written = min(sequence.fed, len(sequence.token_ids))
        self.kv.remember(sequence.table, sequence.token_ids, written)

    def vacate(self, sequence: Sequence) -> None:
        """Take back its row and blocks; what it has produced is cached now, and not before: until
        then nobody has seen all of it who could send it on. Its tokens in flight are not disturbed,
        since the worker runs them before any step that gives these to others."""
        self.cache_written(sequence)
        assert sequence.table is not None
        self.kv.close(sequence.table)
        sequence.table = None
        self._blocks_ran_out = False
        self._free_rows.append(sequence.row)
        self._rows_to_free.append(sequence.row)
        discard(self._running, sequence)
        discard(self._prefilling, sequence)

    def give_up(self) -> list[Sequence]:
        """Those that run, who lose row and blocks: they are a dead worker's."""
        running, self._running = self._running, []
        self._prefilling.clear()
        for sequence in running:
            sequence.table = None
        return running

    def _may_decode(self, sequence: Sequence, plan: StepPlan, preempted: list[Sequence]) -> bool:
        """A closer look at one that has come to where it may go on without."""
        fed = sequence.fed
        if not sequence.prefill_end <= fed < sequence.last_fed:
            return False
        if fed == sequence.capacity and not self._grow(sequence, plan, preempted):
            return False
        sequence.decodes_to = min(sequence.capacity, sequence.last_fed)
        return True

    def _grow(self, sequence: Sequence, plan: StepPlan, preempted: list[Sequence]) -> bool:
        """One more block, at the cost of the latest; False if that was the sequence itself."""
        assert sequence.table is not None
        while (block := self.kv.extend(sequence.table)) is None:
            victim = self._running[-1]
            self.vacate(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.capacity += self.kv.block_tokens
        plan.block_rows.append(sequence.row)
        plan.blocks.append(block)
        return True

    def _prefill(self, sequence: Sequence, plan: StepPlan, budget: int) -> int:
        """The next chunk; returns how many tokens it has."""
        count = min(sequence.prefill_end - sequence.fed, budget, self._chunk_tokens)
        plan.chunks += (sequence.row, sequence.fed, count)
        plan.chunked.append(sequence)
        if sequence.logprobs is not None and sequence.logprobs.prompt_top is not None:
            _score(sequence, plan, count)
        sequence.fed += count
        if sequence.fed == sequence.prefill_end:
            discard(self._prefilling, sequence)
            ended = plan.sampled if sequence.pooling is None else plan.embedded
            ended.append(sequence)
        return count


def _new_row(sequence: Sequence, slot: int, blocks: list[int]) -> NewRow:
    return NewRow(
        row=sequence.row,
        slot=slot,
        token_ids=sequence.token_ids.tobytes(),
        prompt_tokens=sequence.prompt_tokens,
        cached_tokens=sequence.fed,
        blocks=pack(blocks),
        sampling=sequence.sampling,
        logprobs=sequence.wanted_logprobs,
        end_token_ids=tuple(sorted(sequence.eos)) if sequence.sampling.min_tokens else (),
        trace=sequence.trace,
        grammar_id=sequence.grammar_id,
        pooling=sequence.pooling,
    )


def _score(sequence: Sequence, plan: StepPlan, count: int) -> None:
    """Of the next `count` tokens, those that the worker scores: see Step."""
    wanted = sequence.wanted_logprobs
    assert wanted is not None
    scored = min(count, sequence.prompt_tokens - 1 - sequence.fed)
    if wanted.prompt_top is not None and scored > 0:
        plan.scored.append(Scored(sequence, sequence.fed, scored))
