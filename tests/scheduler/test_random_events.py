"""Any order of events: nothing is lost, shared by mistake, kept for ever or said twice."""

import random
from array import array
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.messages import AdminVerb, FinishReason, Logprobs, Pooling, PoolingKind, Tier
from tests.scheduler.fake_loader import UNAVAILABLE
from tests.scheduler.fake_worker import BASE, BROKEN, embedding, logprob_row, reply
from tests.scheduler.world import World

ADAPTERS = ("a", "b", "c", "d", "e")
NAMES = ("x", "y")
POOL_BYTES = 2048
COMMON = (5, 6, 7, 8, 9, 10, 11, 12, 13)  # prompts share beginnings

prompts = st.builds(
    lambda common, rest: (*COMMON[:common], *rest),
    st.sampled_from((0, 4, 8, len(COMMON))),
    st.lists(st.integers(1, 3), min_size=1, max_size=12),
)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.integers(1, 24),
        "adapter": st.sampled_from((None, None, *ADAPTERS)),
        "ignore_eos": st.booleans(),
        "tenant": st.sampled_from(("", "one", "another")),
        "choices": st.sampled_from((1, 1, 1, 2, 4)),
        "grammar": st.sampled_from(("", "", "", "one", "another")),
        "logprobs": st.sampled_from((None, None, Logprobs(), Logprobs(1, prompt_top=1))),
    }
)
embedded = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.just(1),
        "adapter": st.sampled_from((None, *ADAPTERS)),
        "tenant": st.sampled_from(("", "one", "another")),
        "pooling": st.builds(Pooling, st.sampled_from(PoolingKind)),
    }
)


class AnyOrder(RuleBasedStateMachine):
    @initialize(
        kv_blocks=st.integers(12, 20),
        prefix_cache=st.booleans(),
        chunk=st.sampled_from((0, 3, 7)),
        rows=st.integers(1, 4),
        slots=st.integers(1, 6),
        started=st.booleans(),
        workers=st.integers(1, 2),
        limits=st.sampled_from(((0, 0), (0, 0), (2, 3))),
        revalidate=st.sampled_from((0.0, 0.2, 2.0, 1000.0)),
    )
    def begin(
        self,
        started: bool,
        chunk: int,
        workers: int,
        limits: tuple[int, int],
        revalidate: float,
        **sizes: Any,
    ) -> None:
        self.world = World(
            pool_bytes=POOL_BYTES,
            prefill_chunk_tokens=chunk,
            started=started,
            max_wait_seconds=20.0,
            adapter_load_seconds=5.0,
            adapter_revalidate_seconds=revalidate,
            tokenizer_workers=workers,
            max_tenant_running=limits[0],
            max_tenant_waiting=limits[1],
            **sizes,
        )
        self.workers = workers
        self.away: set[int] = set()  # tokenizer workers that do not work yet
        self.worker_is_ready = self.arena_is_ready = started

    @precondition(lambda self: not self.worker_is_ready)
    @rule()
    def worker_ready(self) -> None:
        self.world.worker_ready()
        self.worker_is_ready = True

    @precondition(lambda self: not self.arena_is_ready)
    @rule()
    def arena_ready(self) -> None:
        self.world.arena_ready()
        self.arena_is_ready = True

    @precondition(lambda self: self.worker_is_ready)
    @rule(kv_blocks=st.sampled_from((16, 20)))
    def worker_dies(self, kv_blocks: int) -> None:
        self.world.lose_worker(kv_blocks=kv_blocks)
        self.worker_is_ready = False

    @precondition(lambda self: self.arena_is_ready)
    @rule()
    def loader_dies(self) -> None:
        self.world.lose_loader()
        self.arena_is_ready = False

    @rule(burst=st.lists(requests | embedded, min_size=1, max_size=6))
    def submit(self, burst: list[dict[str, Any]]) -> None:
        for request in burst:
            worker = len(self.world.requests) % self.workers
            self.world.submit(worker=worker, is_lost=worker in self.away, **request)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(1, len(self.world.requests)))
        is_away = self.world.requests[request_id].worker in self.away
        is_lost = is_away and request_id in self.world.unheard
        self.world.cancel(request_id, is_lost=is_lost)

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.world.stop(data.draw(st.sampled_from(self._running())))

    def _running(self) -> list[int]:
        """Those that have said something, as their tokenizer workers know it."""
        world = self.world
        over = world.finished.keys() | world.cancelled | world.unheard
        return [one for one, tokens in world.tokens.items() if tokens and one not in over]

    @precondition(lambda self: self.world.finished.keys() - self.world.heard)
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        unheard = sorted(self.world.finished.keys() - self.world.heard)
        self.world.hear(data.draw(st.sampled_from(unheard)))

    @rule(data=st.data())
    def kill_tokenizer(self, data: st.DataObject) -> None:
        worker = data.draw(st.integers(0, self.workers - 1))
        self.world.kill_tokenizer(worker)
        self.away.add(worker)

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data())
    def meet_tokenizer(self, data: st.DataObject) -> None:
        self.world.meet_tokenizer(data.draw(st.sampled_from(sorted(self.world.dead))))

    @precondition(lambda self: self.away - self.world.dead)
    @rule(data=st.data())
    def still_open(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.away - self.world.dead)))
        self.world.still_open(worker)
        self.away.discard(worker)

    @precondition(lambda self: self._forgotten())
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        self.world.submit_again(data.draw(st.sampled_from(self._forgotten())))

    def _forgotten(self) -> list[int]:
        """What tokenizer workers that work are yet to submit again."""
        world = self.world
        return sorted(one for one in world.unheard if world.requests[one].worker not in self.away)

    @rule(
        verb=st.sampled_from(AdminVerb),
        name=st.sampled_from(NAMES),
        adapter=st.sampled_from(ADAPTERS),
        pinned=st.booleans(),
        in_place=st.booleans(),
    )
    def command(
        self, verb: AdminVerb, name: str, adapter: str, pinned: bool, in_place: bool
    ) -> None:
        match verb:
            case AdminVerb.LOAD:
                how = {"pinned": pinned, "in_place": in_place}
                self.world.command(verb, name=name, adapter=adapter, **how)
            case AdminVerb.UNLOAD:
                self.world.command(verb, name=name)
            case AdminVerb.PIN | AdminVerb.UNPIN:
                self.world.command(verb, adapter=adapter)

    @rule()
    def take_names(self) -> None:
        self.world.take_names()

    @precondition(lambda self: self.world.loader.forgets)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.world.forget(data.draw(st.integers(0, len(self.world.loader.forgets) - 1)))

    @rule(adapter=st.sampled_from(ADAPTERS))
    def prefetch(self, adapter: str) -> None:
        self.world.prefetch(adapter)

    @precondition(lambda self: self.arena_is_ready and self.world.loader.loads)
    @rule(
        data=st.data(),
        version=st.sampled_from(("", "", "", "", "another", BROKEN, "none", "down")),
        nbytes=st.sampled_from((100, 256, 300, 500, 700, 1000, 1500, POOL_BYTES, POOL_BYTES + 1)),
    )
    def answer_load(self, data: st.DataObject, version: str, nbytes: int) -> None:
        which = data.draw(st.integers(0, len(self.world.loader.loads) - 1))
        adapter = self.world.loader.loads[which].adapter.id
        if version == "none":
            self.world.fail_load(which)
        elif version == "down":
            self.world.fail_load(which, UNAVAILABLE)
        else:
            content = version if version == BROKEN else adapter + version
            self.world.stage(which, content=content, nbytes=nbytes)

    @precondition(lambda self: self.world.worker.steps)
    @rule(steps=st.integers(1, 12), arrivals=st.booleans())
    def steps(self, steps: int, arrivals: bool) -> None:
        for _ in range(steps):
            if self.world.worker.steps:
                self.world.step(arrivals=arrivals)

    @precondition(lambda self: self.world.compiling)
    @rule(error=st.sampled_from(("", "", "", "it is too complex")))
    def compile(self, error: str) -> None:
        self.world.compile(error)

    @precondition(lambda self: self.world.worker.placing)
    @rule()
    def arrive(self) -> None:
        self.world.arrive()

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 4.0)))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @invariant()
    def the_figures_add_up(self) -> None:
        if not hasattr(self, "world"):
            return
        world, figures = self.world, self.world.core.figures()
        if not (self.away or world.unheard):
            gone = len(world.finished) + len(world.cancelled)
            assert figures.requests_running + figures.requests_waiting == len(world.requests) - gone
            assert figures.replies_kept == len(world.finished.keys() - world.heard)
        assert 0 <= figures.kv_blocks_used <= figures.kv_blocks_total
        assert figures.adapter_pool_used_bytes <= POOL_BYTES

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        if not self.worker_is_ready:
            self.worker_ready()
        if not self.arena_is_ready:
            self.arena_ready()
        for worker in self.away:
            self.world.meet_tokenizer(worker)
            self.world.still_open(worker)
        while self.world.unheard:
            self.world.submit_again(min(self.world.unheard))
        self.world.run()
        self._check_commands()
        self._check_replies()
        self._check_all_came_back()

    def _check_commands(self) -> None:
        """All end, and when all names are unloaded nothing of what they meant is left."""
        world = self.world
        self._end_commands()
        meant = set(world.names[0].names.values())
        for name in NAMES:
            world.command(AdminVerb.UNLOAD, name=name)
        self._end_commands()
        assert world.names[0].names == {}
        listed = world.list_adapters().values()
        assert all(one.tier == Tier.DISK for one in listed if one.adapter in meant)
        for adapter in ADAPTERS:
            world.command(AdminVerb.UNPIN, adapter=adapter)
        assert world.core.figures().adapters_pinned == 0

    def _end_commands(self) -> None:
        world = self.world
        for _ in range(3 * len(world.commands) + 1):
            world.take_names()
            world.run()
        assert world.done.keys() == world.commands.keys()

    def _check_replies(self) -> None:
        world = self.world
        assert world.finished.keys() | world.cancelled == world.requests.keys()
        for request_id, request in world.requests.items():
            contents = (
                {BASE} if request.adapter is None else world.loader.contents.get(request.adapter)
            )
            prompt = array("i", request.token_ids).tolist()
            produced = world.tokens[request_id]
            end = world.finished.get(request_id)
            if request.pooling is not None:
                assert produced == []
                if end is not None and end.reason is not FinishReason.ERROR:
                    assert end.embedding in [
                        embedding(content, prompt, request.pooling) for content in contents or ()
                    ]
                continue
            whole = end is not None and end.reason is not FinishReason.ERROR
            cut = not whole or request_id in world.stopped
            limit = len(produced) if cut else request.max_tokens
            assert produced == [] or produced in [
                reply(content, prompt, limit, ignore_eos=request.ignore_eos)
                for content in contents or ()
            ]
            if end is not None:
                assert (end.failure is None) == whole
                assert end.usage.prompt_tokens == len(prompt)
                assert end.usage.completion_tokens == len(produced)
            if whole:
                assert produced
            self._check_logprobs(request_id, prompt, produced, whole=whole)

    def _check_logprobs(
        self, request_id: int, prompt: list[int], produced: list[int], *, whole: bool
    ) -> None:
        world, request = self.world, self.world.requests[request_id]
        wanted = request.logprobs
        expected = [] if wanted is None else [logprob_row(token) for token in produced]
        assert world.logprobs[request_id] == expected
        of_prompt = world.prompt_logprobs[request_id]
        if wanted is None or wanted.prompt_top is None or request_id != request.request_id:
            assert of_prompt == []
            return
        scored = [logprob_row(token) for token in prompt[1:]]
        assert of_prompt == scored if whole or produced else of_prompt == scored[: len(of_prompt)]

    def _check_all_came_back(self) -> None:
        world = self.world
        for request_id in world.finished.keys() - world.heard:
            world.hear(request_id)
        assert world.core.figures().replies_kept == 0
        assert world.loader.leases == {}
        assert world.core.figures().kv_blocks_used == 0
        rows = world.settings.rows
        for number in range(rows):
            world.submit((number + 1,), max_tokens=6, tenant=str(number))
            world.step()
        assert world.core.figures().requests_running == rows
        world.run()
        for adapter, nbytes in (("huge", POOL_BYTES), *((one, 100) for one in ADAPTERS)):
            request_id = world.submit(adapter=adapter)
            if world.loader.loads:
                world.stage(nbytes=nbytes)
            world.run()
            assert world.finished[request_id].usage.completion_tokens == 4


AnyOrder.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase


@settings(max_examples=60, deadline=None)
@given(seed=st.randoms(use_true_random=False), rows=st.integers(2, 6))
def test_adapters_of_many_sizes_come_and_go_and_nobody_notices(
    seed: random.Random, rows: int
) -> None:
    world = World(pool_bytes=4096, slots=16, rows=rows, kv_blocks=64)
    sizes = {f"adapter {number}": seed.randint(1, 2000) for number in range(16)}
    for _ in range(60):
        action = seed.random()
        if action < 0.35:
            world.submit(adapter=seed.choice([*sizes]), max_tokens=seed.randint(1, 12))
        elif action < 0.65 and world.loader.loads:
            which = seed.randrange(len(world.loader.loads))
            world.stage(which, nbytes=sizes[world.loader.loads[which].adapter.id])
        elif action < 0.75 and world.worker.placing:
            world.arrive()
        elif world.worker.steps:
            world.step(arrivals=False)
    while world.loader.loads:
        world.stage(nbytes=sizes[world.loader.loads[0].adapter.id])
        world.run()
    world.run()
    for request_id, request in world.requests.items():
        assert request.adapter is not None
        prompt = array("i", request.token_ids).tolist()
        expected = reply(request.adapter.id, prompt, request.max_tokens, ignore_eos=True)
        assert world.tokens[request_id] == expected
