"""What runs next: all of the scheduler's state, and no socket, clock or thread.

Inputs are methods named after what happened. `next_work` decides, `take_outbox` empties what is to
be sent. Times are seconds of one clock, given as `now`. After any input the caller sends the
outbox, then work until there is none, then the outbox again.

Up to MAX_STEPS_IN_FLIGHT steps are sent before their tokens are known. The worker applies steps in
the order they were sent, so rows and blocks that a step in flight still uses are given to others
in a later one. Freed rows are told to the worker with the next step that has work to do.
Adapters are brought in beside the steps, as soon as there is room for them.
"""

import heapq
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from pipeline.config import Settings
from pipeline.embeddings import is_finite, split
from pipeline.messages import (
    GONE,
    REQUEST_BITS,
    AdapterDescription,
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterList,
    AdapterPlaced,
    AdapterStaged,
    AdminCommand,
    AliasesTaken,
    ArenaReady,
    AttachArena,
    Cancel,
    EndsHeard,
    Failure,
    Finished,
    FinishReason,
    GrammarCompiled,
    Heard,
    ListAdapters,
    Message,
    NamesKept,
    PlaceAdapter,
    Prefetch,
    PromptLogprobs,
    Span,
    Spans,
    Step,
    StepDone,
    StillOpen,
    Submit,
    Tier,
    Usage,
    WorkerReady,
)
from scheduler import failures
from scheduler.adapters import Adapters
from scheduler.administration import Administration
from scheduler.batch import Batch
from scheduler.catalogue import Catalogue
from scheduler.fair_share import FairShare
from scheduler.figures import Figures
from scheduler.grammars import Grammars
from scheduler.kv_blocks import KvBlocks
from scheduler.listeners import NOBODY, Listeners
from scheduler.policy import Policy, by_order
from scheduler.sequence import Sequence
from scheduler.step_cost import StepCost
from scheduler.step_plan import Flight, StepPlan
from scheduler.timings import Timings
from scheduler.token_logprobs import StepLogprobs

MAX_STEPS_IN_FLIGHT = 2
TOKEN_BYTES = 4

Envelope = tuple[str, int, Message]  # destination process, its index, what it gets


class Scheduler:
    """The core. See the module's docstring for how it is driven.

    policy  who is next; the product's own unless given
    """

    def __init__(
        self,
        *,
        settings: Settings,
        eos_token_ids: Iterable[int],
        policy: Policy | None = None,
    ) -> None:
        self._settings = settings
        self._eos = frozenset(eos_token_ids)
        self._outbox: list[Envelope] = []
        self._listeners = Listeners(settings.tokenizer_workers)
        self._policy = policy or FairShare(
            max_overtaking_seconds=settings.max_overtaking_seconds,
            max_tenant_running=settings.max_tenant_running,
            rows=settings.rows,
        )
        self._adapters = Adapters(
            policy=self._policy,
            send=lambda message: self._outbox.append(("adapter_loader", 0, message)),
            load_seconds=settings.adapter_load_seconds,
            revalidate_seconds=settings.adapter_revalidate_seconds,
        )
        self._catalogue = Catalogue()
        self._administration = Administration(
            adapters=self._adapters,
            catalogue=self._catalogue,
            send=lambda frontend, message: self._outbox.append(("frontend", frontend, message)),
            frontends=settings.frontends,
            load_seconds=settings.adapter_load_seconds,
            pinned_fraction=settings.pinned_pool_fraction,
        )
        self._grammars = Grammars(lambda message: self._outbox.append(("gpu_worker", 0, message)))
        self._placements: deque[PlaceAdapter] = deque()  # to be sent
        self._worker: WorkerReady | None = None
        self._arena: ArenaReady | None = None
        self._step_tokens = 0
        self._batch = self._new_batch(rows=0, kv_blocks=0, block_tokens=1)  # until it is ready
        self._submitted = 0
        self._unstarted: Counter[str] = Counter()  # requests that have not, by tenant
        self._sequence_of: dict[int, Sequence] = {}  # by request
        self._start_deadlines: list[tuple[float, int, Sequence]] = []  # heap
        self._resting: list[Sequence] = []  # preempted, with tokens in flight
        self._steps_sent = 0
        self._flights: deque[Flight] = deque()
        self._step_done_at = 0.0  # the latest
        self._cost = StepCost()
        self._hit_tokens = 0
        self._generated = 0
        self.timings = Timings()

    # --- what happened ---

    def worker_ready(self, message: WorkerReady, now: float) -> None:
        """The worker has started, and its device holds nothing of ours."""
        self._worker = message
        self._step_tokens = message.step_tokens
        self._batch = self._new_batch(
            rows=message.rows,
            kv_blocks=message.kv_blocks,
            block_tokens=message.block_tokens,
            preemptions=self._batch.preemptions,
        )
        self._grammars.worker_ready()
        self._adapters.worker_ready(
            pool_bytes=message.adapter_pool_bytes, slots=message.adapter_slots
        )
        for sequence in list(self._sequence_of.values()):
            if not sequence.ended:  # with another that it followed
                self._check_fits(sequence, now)
        self._attach_arena()

    def worker_lost(self, now: float) -> None:
        """It has died: nothing more is heard from it, until another is ready. All that ran waits
        to run again, as after a preemption."""
        self._worker = None
        ran = self._take_back()
        self._batch = self._new_batch(
            rows=0, kv_blocks=0, block_tokens=1, preemptions=self._batch.preemptions
        )
        self._grammars.worker_lost()
        self._wait_anew(ran, now)
        for sequence, failure in self._adapters.pool_lost(now):
            self._fail(sequence, failure, now)

    def arena_ready(self, message: ArenaReady) -> None:
        """The loader has started; perhaps after another, whose leases it has to honour."""
        self._arena = message
        self._catalogue.arena_is_new()
        self._adapters.loader_started()
        self._attach_arena()

    def loader_lost(self) -> None:
        """It has died: nothing more is heard from it, until another is ready."""
        self._adapters.loader_lost()

    def frontend_started(self, frontend: int, now: float) -> None:
        """A frontend was started again; nobody waits for what its predecessor had asked for."""
        self._administration.frontend_started(frontend)
        running = [one for one in self._sequence_of if one >> REQUEST_BITS == frontend]
        for request_id in running + self._listeners.kept_of(frontend):
            self.cancel(Cancel(request_id), now)

    def prefetch(self, message: Prefetch, now: float) -> None:
        self._adapters.prefetch(message, now)

    def tokenizer_started(self, worker: int) -> None:
        """A tokenizer worker was started again; from its predecessor nothing more is heard."""
        self._listeners.started(worker, self._sequence_of.values())

    def still_open(self, message: StillOpen, now: float) -> None:
        """What its predecessors may have been told to cancel is cancelled."""
        open_ids = frozenset(message.request_ids)
        for request_id in self._listeners.orphans(message.worker, message.frontend):
            if request_id not in open_ids:
                self.cancel(Cancel(request_id), now)

    def ends_heard(self, message: EndsHeard, now: float) -> None:
        for request_id in message.request_ids:
            self.cancel(Cancel(request_id), now)  # its worker may have ended it, and says so later

    def submit(self, message: Submit, now: float) -> None:
        choices: Iterable[int] = range(message.choices)
        if message.heard is not None:
            choices = self._resume(message, message.heard)
        if choices:
            self._begin(message, choices, now)

    def _begin(self, message: Submit, choices: Iterable[int], now: float) -> None:
        sequence = self._take(message, choices, now)
        self._wait_to_start(sequence)
        may_start = self._grammars.join(sequence)
        for follower in sequence.followers:
            self._grammars.share(follower)
        if self._worker is not None and not self._check_fits(sequence, now):
            return
        limit = self._settings.max_tenant_waiting
        if limit and self._unstarted[sequence.tenant] > limit:
            self._fail(sequence, failures.tenant_waits(limit), now)
            return
        if sequence.adapter is not None:
            resident = self._adapters.is_resident(sequence.adapter)
            self._catalogue.asked(sequence.adapter, now, resident=resident)
        deadline = sequence.arrived + self._settings.max_wait_seconds
        for one in (sequence, *sequence.followers):
            heapq.heappush(self._start_deadlines, (deadline, one.order, one))
        if may_start:
            self._join(sequence, now)

    def cancel(self, message: Cancel, now: float) -> None:
        sequence = self._sequence_of.get(message.request_id)
        if sequence is None:
            if not message.stopped:
                self._listeners.forget(message.request_id)
            return
        followers = sequence.followers
        self._remove(sequence)
        if message.stopped:
            usage = sequence.usage(now)
            end = Finished(sequence.request_id, FinishReason.STOP, usage)
            self._listeners.keep(sequence, end)
        else:
            self._listeners.forget(sequence.request_id)
        if followers:
            self._succeed(followers, now)

    def adapter_staged(self, message: AdapterStaged, now: float) -> None:
        if self._adapters.staged(message):
            self._catalogue.staged(message, now)

    def adapter_failed(self, message: AdapterFailed, now: float) -> None:
        for sequence in self._adapters.failed(message.adapter, message.failure, now):
            self._fail(sequence, message.failure, now)

    def adapter_dropped(self, message: AdapterDropped, now: float) -> None:
        self._catalogue.dropped(message.adapter)
        self._adapters.dropped(message.adapter, now)

    def admin_command(self, message: AdminCommand, now: float) -> None:
        self._administration.command(message, now)

    def aliases_taken(self, message: AliasesTaken) -> None:
        self._administration.aliases_taken(message)

    def names_kept(self, message: NamesKept) -> None:
        self._administration.names_kept(message)

    def list_adapters(self, message: ListAdapters, now: float) -> None:
        running = Counter(one.named for one in self._sequence_of.values() if one.table is not None)
        waiting = Counter(one.named for one in self._sequence_of.values() if one.table is None)
        described = [self._described(key, now, running, waiting) for key in self._catalogue]
        described.sort(key=lambda one: one.adapter)
        answer = AdapterList(message.command_id, tuple(described))
        self._outbox.append(("frontend", message.frontend, answer))

    def adapter_placed(self, message: AdapterPlaced) -> None:
        """The oldest placement is done."""
        self._adapters.placed(message.slot)

    def grammar_compiled(self, message: GrammarCompiled, now: float) -> None:
        """Those that waited for it go on to their adapters."""
        if message.error:
            for sequence in self._grammars.failed(message.grammar_id):
                self._fail(sequence, failures.no_grammar(message.error), now)
            return
        for sequence in self._grammars.compiled(message.grammar_id):
            self._join(sequence, now)

    def step_done(self, message: StepDone, now: float) -> None:
        """The oldest step in flight has its tokens."""
        flight = self._flights.popleft()
        if flight.step_id != message.step_id:
            raise RuntimeError(f"step {message.step_id} is done before step {flight.step_id}")
        self._cost.learn(flight.work, now - max(flight.sent, self._step_done_at))
        since_last, self._step_done_at = now - self._step_done_at, now
        logprobs = StepLogprobs(flight, message.logprobs)
        for sequence, rows in logprobs.prompts:
            self._tell_prompt(sequence, rows)
        self._policy.produced(flight.sampled)
        token_ids = array("i", message.token_ids)
        dropped = self._take_tokens(flight.sampled, token_ids, logprobs.of_sampled, now)
        if flight.embedded:
            self._take_embeddings(flight.embedded, message.embeddings, now)
        # a row that decodes has had a token in the step before
        self.timings.between_tokens.add(since_last, max(0, flight.work.rows - dropped))
        for sequence in [one for one in self._resting if one.resume_after <= flight.step_id]:
            self._resting.remove(sequence)
            sequence.interrupted = now
            self._adapters.join(sequence, now)
        for extent in flight.unpins:  # last: an outdated adapter stays for those that join
            self._adapters.unpin(extent)
        self._flush()  # one message per worker and step

    def tick(self, now: float) -> None:
        """Nothing happened until now. To be called at `next_deadline` at the latest."""
        deadlines = self._start_deadlines
        while deadlines and (deadlines[0][0] <= now or _started(deadlines[0][2])):
            sequence = heapq.heappop(deadlines)[2]
            if not _started(sequence):
                failure = failures.waited_too_long(self._settings.max_wait_seconds)
                self._fail(sequence, failure, now)
        for sequence in self._adapters.overdue(now):
            assert sequence.adapter is not None
            failure = failures.load_too_slow(sequence.adapter, self._settings.adapter_load_seconds)
            self._fail(sequence, failure, now)

    # --- what is to be done ---

    def next_work(self, now: float) -> PlaceAdapter | Step | None:
        """What to send to the worker now; None while it has enough or there is nothing to do.

        Adapters come first, and do not wait for a step in flight to end, so that a step that wants
        one finds it there or on its way.
        """
        self._administration.advance(now)
        if self._worker is None:
            return None
        if not self._placements:
            placements, failed = self._adapters.place(now)
            self._placements.extend(placements)
            for sequence, failure in failed:
                self._fail(sequence, failure, now)
            self._administration.advance(now)  # some may have failed
        return self._placements.popleft() if self._placements else self._next_step(now)

    def _next_step(self, now: float) -> Step | None:
        if len(self._flights) == MAX_STEPS_IN_FLIGHT:
            return None
        plan = StepPlan()
        for sequence in self._batch.decode(plan):
            self._preempted(sequence, now)
        budget = self._prompt_budget(plan)
        budget = self._batch.continue_prefills(plan, budget)
        self._start_sequences(plan, budget, now)
        if plan.is_empty():
            return None
        self._steps_sent += 1
        work = plan.work(self._adapters.running_bytes)
        self.timings.step_rows.add(len(plan.decode_rows) + len(plan.chunked))
        self._flights.append(Flight(self._steps_sent, plan, work, now))
        step = plan.step(self._steps_sent, self._batch.seal(plan))
        for sequence in plan.chunked:
            if sequence.followers and sequence.fed >= sequence.prefill_end:
                self._release(sequence, now)
        return step

    def _prompt_budget(self, plan: StepPlan) -> int:
        """Tokens of prompts for a step with these decode rows, whose streams wait for it."""
        budget = self._step_tokens - len(plan.decode_rows)
        seconds = self._settings.max_step_seconds
        if not (seconds and plan.decode_rows):
            return budget
        work = plan.work(self._adapters.running_bytes)
        within = self._cost.prompt_tokens_within(seconds, work)
        return budget if within is None else min(budget, within)

    def take_outbox(self) -> list[Envelope]:
        """What is to be sent to whom, in this order; afterwards the outbox is empty."""
        self._flush()
        outbox = self._outbox[:]
        self._outbox.clear()
        return outbox

    def next_deadline(self) -> float | None:
        """When `tick` has something to do, if nothing happens before."""
        deadlines = self._start_deadlines
        while deadlines and _started(deadlines[0][2]):
            heapq.heappop(deadlines)
        start = deadlines[0][0] if deadlines else None
        load = self._adapters.next_deadline()
        command = self._administration.next_deadline()
        return min((one for one in (start, load, command) if one is not None), default=None)

    @property
    def idle(self) -> bool:
        """No request is left and no step is in flight."""
        return not self._sequence_of and not self._flights

    def facts(self) -> dict[str, str | int | float | None] | None:
        """What is known of the device once worker and arena are there; None before."""
        if self._worker is None or self._arena is None:
            return None
        return {
            "kv_blocks": self._worker.kv_blocks,
            "kv_block_tokens": self._worker.block_tokens,
            "adapter_pool_bytes": self._worker.adapter_pool_bytes,
        }

    def figures(self) -> Figures:
        return Figures(
            requests_running=len(self._batch),
            requests_waiting=len(self._sequence_of) - len(self._batch),
            replies_kept=self._listeners.kept,
            kv_blocks_used=self._batch.kv.used,
            kv_blocks_total=self._batch.kv.total,
            kv_block_tokens=self._batch.kv.block_tokens,
            adapters_resident=self._adapters.resident,
            adapters_pinned=self._adapters.kept,
            adapter_pool_used_bytes=self._adapters.pool_used_bytes,
            adapter_pool_pinned_bytes=self._adapters.kept_bytes,
            adapter_pool_evictions=self._adapters.evictions,
            prefix_cache_hit_tokens=self._hit_tokens,
            preemptions=self._batch.preemptions,
            steps=self._steps_sent,
            tokens_generated=self._generated,
        )

    def tier_hits(self) -> Mapping[Tier, int]:
        """Requests by where their adapter lay when they came."""
        return self._catalogue.hits

    def adapter_names(self) -> tuple[list[str], list[str]]:
        """What clients call the adapters that are resident, and those that are waited for.

        Those of a tenant alone are left out, and merges, which have no name that a request could
        give. The latest used come first.
        """
        resident, absent = self._adapters.by_use()
        return self._names(resident), self._names(absent)

    def _names(self, keys: Iterable[AdapterKey]) -> list[str]:
        names: dict[str, None] = {}
        for key in keys:
            if not key.scope and key.merge is None:
                id = f"{key.id}@{key.revision}" if key.revision else key.id
                names.update(dict.fromkeys(self._administration.names_of(key) or [id]))
        return list(names)

    def _described(
        self,
        key: AdapterKey,
        now: float,
        running: Counter[AdapterKey | None],
        waiting: Counter[AdapterKey | None],
    ) -> AdapterDescription:
        known = self._catalogue.of(key)
        return AdapterDescription(
            adapter=key,
            tier=self._catalogue.tier(key, resident=self._adapters.is_resident(key)),
            nbytes=known.nbytes,
            rank=known.rank,
            pinned=self._adapters.is_kept(key),
            pins=self._adapters.pins(key),
            running=running[key],
            waiting=waiting[key],
            loads=known.loads,
            idle_seconds=now - known.last_used,
        )

    # --- tokens of a step ---

    def _take_tokens(
        self,
        sampled: list[Sequence],
        token_ids: "array[int]",
        logprobs: dict[int, bytes],
        now: float,
    ) -> int:
        """Runs for each token that is produced, so it looks at little. Returns how many came for
        those that had ended."""
        if logprobs:
            self._take_logprobs(sampled, token_ids, logprobs)
        replies = self._listeners.replies
        dropped = 0
        for sequence, token in zip(sampled, token_ids, strict=True):
            if sequence.ended or token < 0:
                if sequence.ended:
                    dropped += 1
                else:
                    self._fail(sequence, failures.no_token(token, sequence.adapter), now)
                continue
            known = sequence.token_ids
            known.append(token)
            reply = replies[sequence.worker]
            reply.request_ids.append(sequence.request_id)
            reply.token_ids.append(token)
            if token in sequence.eos or len(known) >= sequence.notice_at:
                self._notice(sequence, token, now)
        return dropped

    def _take_logprobs(
        self, sampled: list[Sequence], token_ids: "array[int]", logprobs: dict[int, bytes]
    ) -> None:
        """Before the tokens that they are of, which are said in this order."""
        said = [len(reply.request_ids) for reply in self._listeners.replies]
        for index, (sequence, token) in enumerate(zip(sampled, token_ids, strict=True)):
            if sequence.ended or token < 0:
                continue
            if index in logprobs:
                reply = self._listeners.replies[sequence.worker]
                reply.logprobs[said[sequence.worker]] = logprobs[index]
                sequence.logprob_rows.append(logprobs[index])
            said[sequence.worker] += 1

    def _take_embeddings(self, embedded: list[Sequence], embeddings: bytes, now: float) -> None:
        for sequence, embedding in zip(embedded, split(embeddings, len(embedded)), strict=True):
            if sequence.ended:
                continue
            if is_finite(embedding):
                self._finish(sequence, FinishReason.EMBEDDED, now, embedding=embedding)
            else:
                self._fail(sequence, failures.not_finite("hidden states", sequence.adapter), now)

    def _notice(self, sequence: Sequence, token: int, now: float) -> None:
        """Its first token since it started came, or its last."""
        if token in sequence.eos:
            self._finish(sequence, FinishReason.EOS, now)
        elif len(sequence.token_ids) == sequence.end:
            self._finish(sequence, FinishReason.LENGTH, now)
        else:
            self._time_first_token(sequence, now)
            sequence.notice_at = sequence.end

    def _time_first_token(self, sequence: Sequence, now: float) -> None:
        """The first of all, or the first after a preemption, has come if it had not."""
        if sequence.first_token is None:
            sequence.first_token = now
            self.timings.first_token.add(now - sequence.arrived)
        elif sequence.interrupted is not None:
            self.timings.between_tokens.add(now - sequence.interrupted)
        sequence.interrupted = None

    def _tell_prompt(self, sequence: Sequence, rows: list[bytes]) -> None:
        if sequence.worker != NOBODY:
            message = PromptLogprobs(sequence.request_id, rows)
            self._outbox.append(("tokenizer_workers", sequence.worker, message))

    def _flush(self) -> None:
        said, tokens = self._listeners.take()
        self._generated += tokens
        for worker, message in said:
            self._outbox.append(("tokenizer_workers", worker, message))

    # --- starts ---

    def _start_sequences(self, plan: StepPlan, budget: int, now: float) -> None:
        """As many as rows, blocks and the rest of the step's budget allow."""
        if self._resting:
            return  # nobody takes the blocks of one that was preempted before it can come back
        while budget and self._batch.has_room:
            sequence = self._policy.first(now)
            if sequence is None:
                return
            budget -= self._start(sequence, plan, budget, now)

    def _start(self, sequence: Sequence, plan: StepPlan, budget: int, now: float) -> int:
        """Returns the tokens of its first chunk; 0 if it cannot start now, or has failed."""
        key = sequence.adapter
        extent, slot, content = None, -1, ""
        if key is not None:
            extent, content = self._adapters.resident_at(key)
            slot = extent.slot
        if key is not None and sequence.started is not None and sequence.content != content:
            self._fail(sequence, failures.adapter_changed(key), now)
            return 0
        sequence.content = content
        tokens = self._batch.start(sequence, slot, plan, budget)
        if tokens == 0:
            return 0
        self._policy.start(sequence, sequence.prefill_end - plan.new_rows[-1].cached_tokens, now)
        sequence.extent = extent
        if extent is not None:
            self._adapters.pin(extent)
        self._adapters.leave(sequence)
        if sequence.started is None:
            self._waits_no_more(sequence)
            sequence.started = now
            self.timings.queue.add(now - sequence.arrived)
            self._trace("queue", sequence, sequence.submitted, now)
            sequence.cached_tokens = plan.new_rows[-1].cached_tokens
            self._hit_tokens += sequence.cached_tokens
        return tokens

    def _preempted(self, sequence: Sequence, now: float) -> None:
        """It starts again once its tokens in flight are known."""
        if self._flights:
            sequence.resume_after = self._flights[-1].step_id
            self._resting.append(sequence)
        else:
            sequence.interrupted = self._step_done_at
            self._adapters.join(sequence, now)
        self._unpin(sequence)  # last, as in step_done

    def _new_batch(
        self, *, rows: int, kv_blocks: int, block_tokens: int, preemptions: int = 0
    ) -> Batch:
        kv = KvBlocks(
            blocks=kv_blocks,
            block_tokens=block_tokens,
            prefix_cache=self._settings.prefix_cache,
        )
        chunk_tokens = self._settings.prefill_chunk_tokens or self._step_tokens
        return Batch(rows=rows, kv=kv, chunk_tokens=chunk_tokens, preemptions=preemptions)

    def _attach_arena(self) -> None:
        if self._worker is not None and self._arena is not None:
            attach = AttachArena(self._arena.path, self._arena.nbytes)
            self._outbox.append(("gpu_worker", 0, attach))

    # --- requests of a tokenizer worker that has died ---

    def _resume(self, message: Submit, heard: Heard) -> list[int]:
        """Its worker hears what came of it, and what is to come; gives the choices that are not
        known here and are to begin."""
        unknown = []
        for choice, tokens in enumerate(heard):
            request_id = message.request_id + choice
            if tokens == GONE:
                continue
            running = self._sequence_of.get(request_id)
            resumed = self._listeners.resume(request_id, running, message.worker)
            if resumed is not None:
                self._outbox.append(("tokenizer_workers", message.worker, resumed))
            elif tokens:
                self._lost(message, request_id)
            else:
                unknown.append(choice)
        return unknown

    def _lost(self, message: Submit, request_id: int) -> None:
        """Its client has the beginning of a reply that cannot be gone on with."""
        usage = Usage(len(message.token_ids) // TOKEN_BYTES, 0)
        end = Finished(request_id, FinishReason.ERROR, usage, failures.reply_is_lost())
        self._listeners.replies[message.worker].finished.append(end)

    # --- a worker that has died ---

    def _take_back(self) -> list[Sequence]:
        """All that runs, and what was in flight to it. Tokens that were told stay as they are."""
        ran = sorted([*self._batch.give_up(), *self._resting], key=by_order)
        for sequence in ran:
            sequence.extent = None
            if sequence.interrupted is None:
                sequence.interrupted = self._step_done_at
        self._resting.clear()
        self._flights.clear()
        self._placements.clear()
        return ran

    def _wait_anew(self, ran: list[Sequence], now: float) -> None:
        """For those that have run, and for grammars, which no worker has compiled now."""
        for sequence in list(self._sequence_of.values()):
            if sequence.grammar and sequence.leader is None and not self._grammars.waits(sequence):
                if sequence not in ran:
                    self._adapters.leave(sequence)
                self._grammars.wait(sequence)
        for sequence in ran:
            if not sequence.grammar:
                self._adapters.join(sequence, now)

    # --- several choices of a prompt: the first computes it, the others find it in the cache ---

    def _take(self, message: Submit, choices: Iterable[int], now: float) -> Sequence:
        """The sequence of the first of these choices; the others follow it."""
        sequences = []
        for choice in choices:
            self._submitted += 1
            one = Sequence(message, order=self._submitted, eos=self._eos, choice=choice, now=now)
            self._sequence_of[one.request_id] = one
            sequences.append(one)
        leader, *followers = sequences
        _follow(leader, followers)
        return leader

    def _join(self, leader: Sequence, now: float) -> None:
        """It may start once its adapter is there."""
        self._adapters.join(leader, now)
        if not self._settings.prefix_cache:
            self._release(leader, now)

    def _release(self, leader: Sequence, now: float) -> None:
        """What they wait for is in the cache, or is not going to be."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.leader = None
            self._adapters.join(follower, now)

    def _succeed(self, followers: list[Sequence], now: float) -> None:
        """Whom they followed has left before it came to the end of their prompt."""
        leader, *others = followers
        leader.leader = None
        _follow(leader, others)
        self._wait_to_start(leader)
        if self._grammars.wait(leader):
            self._join(leader, now)

    # --- ends ---

    def _check_fits(self, sequence: Sequence, now: float) -> bool:
        """Fail what could not run even alone."""
        needed = self._batch.kv.blocks_for(sequence.last_fed)
        total = self._batch.kv.total
        if needed > total:
            self._fail(sequence, failures.too_many_blocks(needed, total), now)
        return not sequence.ended

    def _fail(self, sequence: Sequence, failure: Failure, now: float) -> None:
        self._finish(sequence, FinishReason.ERROR, now, failure)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        failure: Failure | None = None,
        embedding: bytes = b"",
    ) -> None:
        followers = sequence.followers
        if sequence.produced:
            self._time_first_token(sequence, now)
        self._remove(sequence)
        usage = sequence.usage(now)
        finished = Finished(sequence.request_id, reason, usage, failure, embedding)
        self._listeners.replies[sequence.worker].finished.append(finished)
        self._listeners.keep(sequence, finished)
        for follower in list(followers):  # it failed before its prompt was done, and they with it
            self._finish(follower, reason, now, failure)

    def _remove(self, sequence: Sequence) -> None:
        """Nothing more comes of this sequence; tokens of it that are in flight are dropped."""
        sequence.ended = True
        del self._sequence_of[sequence.request_id]
        waited_for_grammar = self._grammars.leave(sequence)
        if sequence.started is None:
            self._waits_no_more(sequence)
        else:
            ended = max(self._step_done_at, sequence.first_token or sequence.started)
            self.timings.inference.add(ended - sequence.started)
            if sequence.first_token is not None:
                self._trace("decode", sequence, sequence.first_token, ended)
        if sequence.table is not None:
            self._batch.vacate(sequence)
            self._unpin(sequence)
        elif sequence in self._resting:
            self._resting.remove(sequence)
        elif sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        elif not waited_for_grammar:
            self._adapters.leave(sequence)
            self._batch.someone_else_is_next()
        self._policy.end(sequence)

    def _wait_to_start(self, sequence: Sequence) -> None:
        """It counts as a request of its tenant that waits; those that follow it do not."""
        sequence.counted = True
        self._unstarted[sequence.tenant] += 1

    def _trace(self, name: str, sequence: Sequence, started: float, ended: float) -> None:
        """A span of a request that is traced."""
        if sequence.trace:
            attributes: dict[str, str | int | float | bool] = {
                "loradex.prompt_tokens": sequence.prompt_tokens,
                "loradex.cached_tokens": sequence.cached_tokens,
                "loradex.produced_tokens": sequence.produced,
            }
            span = Span(sequence.trace, name, started, ended, attributes)
            self._outbox.append(("frontend", 0, Spans("scheduler", 0, (span,))))

    def _waits_no_more(self, sequence: Sequence) -> None:
        """For its first start; its tenant may let another wait."""
        if not sequence.counted:
            return
        sequence.counted = False
        self._unstarted[sequence.tenant] -= 1
        if not self._unstarted[sequence.tenant]:
            del self._unstarted[sequence.tenant]

    def _unpin(self, sequence: Sequence) -> None:
        """It does not run any more, but its row in the newest step in flight may."""
        extent, sequence.extent = sequence.extent, None
        if extent is None:
            return
        if self._flights:
            self._flights[-1].unpins.append(extent)
        else:
            self._adapters.unpin(extent)


def _follow(leader: Sequence, followers: list[Sequence]) -> None:
    leader.followers = followers
    for follower in followers:
        follower.leader = leader


def _started(sequence: Sequence) -> bool:
    """Its deadline to start does not matter any more."""
    return sequence.ended or sequence.started is not None
