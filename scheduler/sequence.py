"""A request while it is scheduled: its tokens, and how far they have come."""

from array import array

import msgspec

from pipeline.choices import seed_of
from pipeline.messages import (
    Finished,
    Logprobs,
    PoolingKind,
    Resumed,
    Sampling,
    Submit,
    Usage,
)
from scheduler.adapter_pool import Extent
from scheduler.kv_blocks import NEVER, PageTable


class Sequence:
    """One request, from its submit to its end. Only the core changes it.

    token_ids holds the prompt and what is known to have been produced. With steps in flight the
    KV of more positions is written, or about to be, than tokens are known:

        0            prompt_tokens        len(token_ids)   fed      end
        |---- prompt ------|---- produced ------|-- in flight --|----|
    """

    __slots__ = (
        "adapter",
        "adapter_token",
        "arrived",
        "cached_tokens",
        "capacity",
        "content",
        "counted",
        "decodes_to",
        "end",
        "ended",
        "eos",
        "extent",
        "fed",
        "first_token",
        "followers",
        "grammar",
        "grammar_id",
        "interrupted",
        "last_fed",
        "leader",
        "logprob_rows",
        "logprobs",
        "named",
        "notice_at",
        "order",
        "pooling",
        "prefill_end",
        "prompt_logprob_rows",
        "prompt_tokens",
        "request_id",
        "resume_after",
        "row",
        "sampling",
        "scored",
        "started",
        "submitted",
        "table",
        "tenant",
        "token_ids",
        "trace",
        "worker",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        order: int,
        eos: frozenset[int],
        choice: int = 0,
        now: float = 0.0,
    ) -> None:
        self.request_id = submit.request_id + choice
        self.worker = submit.worker  # index of the tokenizer worker that hears of it
        self.arrived = submit.arrived
        self.named = submit.adapter
        self.adapter = submit.adapter  # or that of the outdated content it has started with
        self.adapter_token = submit.adapter_token
        self.tenant = submit.tenant
        self.sampling = _sampling(submit, choice)
        self.logprobs = _logprobs(submit, choice)
        self.pooling = submit.pooling  # it is embedded, and produces nothing
        self.trace = submit.trace
        self.grammar = submit.grammar
        self.grammar_id = 0  # of scheduler.grammars; 0 is none
        self.order = order  # of submission among all requests
        self.eos = (frozenset[int]() if submit.ignore_eos else eos).union(submit.stop_token_ids)

        self.token_ids = array("i", submit.token_ids)
        self.prompt_tokens = len(self.token_ids)
        self.end = self.prompt_tokens + submit.max_tokens  # tokens at which its length ends it
        self.last_fed = self.end - 1  # the last token of all is never fed

        self.counted = False  # among the requests of its tenant that have not started
        self.leader: Sequence | None = None  # whose prompt it waits for, which is its own
        self.followers: list[Sequence] = []  # that wait for its prompt
        self.scored = 0  # tokens of its prompt that have given the log-probability of the next
        self.prompt_logprob_rows: list[bytes] = []  # which is in these, if it was wanted
        self.logprob_rows: list[bytes] = []  # of what is produced, if they are wanted

        self.row = -1  # while it runs: its row of the worker's table
        self.table: PageTable | None = None  # while it runs: its KV blocks
        self.extent: Extent | None = None  # while it runs: where its adapter lies
        self.fed = 0  # positions whose KV is written by the steps sent so far
        self.prefill_end = 0  # tokens that are prefilled; what follows is decoded
        self.capacity = 0  # positions that its blocks hold
        self.decodes_to = 0  # positions that are fed one by one without a look at more than that
        self.notice_at = 0  # known tokens at which the core looks at more than EOS
        self.resume_after = 0  # after a preemption: the step that has its last tokens
        self.interrupted: float | None = None  # after one: when its last token came

        self.content = ""  # of its adapter, once it has started
        self.cached_tokens = 0
        self.submitted = now
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended = False

    @property
    def produced(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def wanted_logprobs(self) -> Logprobs | None:
        """What is still to be had of them: its prompt's are had once."""
        wanted = self.logprobs
        if wanted is None or wanted.prompt_top is None or self.scored < self.prompt_tokens - 1:
            return wanted
        return Logprobs(wanted.top)

    @property
    def shareable_tokens(self) -> int:
        """How many of its first may come from the prefix cache: those of which nothing is wanted
        but their KV. NEVER: all. What a mean is made of starts anew after a preemption."""
        wanted = self.wanted_logprobs
        if wanted is not None and wanted.prompt_top is not None:
            return self.scored
        if self.pooling is not None and self.pooling.kind is PoolingKind.MEAN:
            return 0
        return NEVER

    def resumed(self, finished: Finished | None = None) -> Resumed:
        """All that it has said, and its end, for a tokenizer worker that has not heard it."""
        return Resumed(
            request_id=self.request_id,
            token_ids=self.token_ids[self.prompt_tokens :].tobytes(),
            logprobs=self.logprob_rows[:],
            prompt_logprobs=self.prompt_logprob_rows[:],
            first_token=self.first_token or 0.0,
            finished=finished,
        )

    def usage(self, now: float) -> Usage:
        started = now if self.started is None else self.started
        first_token = now if self.first_token is None else self.first_token
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.produced,
            cached_tokens=self.cached_tokens,
            queue_seconds=started - self.arrived,
            first_token_seconds=first_token - self.arrived if self.produced else 0.0,
            total_seconds=now - self.arrived,
        )


def _sampling(submit: Submit, choice: int) -> Sampling:
    if choice == 0:
        return submit.sampling
    seed = seed_of(submit.sampling.seed, choice)
    return msgspec.structs.replace(submit.sampling, seed=seed)


def _logprobs(submit: Submit, choice: int) -> Logprobs | None:
    """The prompt is the same for all choices, and its tokens are told once."""
    wanted = submit.logprobs
    return wanted if choice == 0 or wanted is None else Logprobs(wanted.top)
