"""Fair shares: of tenants, of the adapters of a tenant, and what each may have at most."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import FailureKind, FinishReason, Submit
from scheduler.fair_share import FEW_COUNTERS, INPUT_COST, OUTPUT_COST, ROW_TOKENS, FairShare
from scheduler.sequence import Sequence as Request
from tests.scheduler.world import World, key

STEP_TOKENS = 16
ROWS = 16  # of policies that are driven by hand
TURN = ROW_TOKENS * ROWS


def fair_world(*, kv_blocks: int = 256, slots: int = 64, **settings: Any) -> World:
    return World(kv_blocks=kv_blocks, slots=slots, pool_bytes=slots * 512, **settings)


def start_order(world: World, name: Callable[[int], str]) -> list[str]:
    """Whose requests end, in order, which with one row is the order in which they started."""
    world.run()
    return [name(request_id) for request_id in world.finished]


def test_a_tenant_with_one_request_does_not_wait_for_all_of_another() -> None:
    world = fair_world(rows=1)
    flood = [world.submit(tenant="flood") for _ in range(20)]
    victim = world.submit(tenant="victim")
    world.run()
    assert list(world.finished)[:3] == [flood[0], victim, flood[1]]


def test_tenants_with_replies_of_different_length_get_the_same_number_of_tokens() -> None:
    world = fair_world(rows=1)
    for _ in range(40):
        world.submit([1], max_tokens=3, tenant="short")
    for _ in range(12):
        world.submit([1], max_tokens=12, tenant="long")
    while world.core.figures().requests_waiting > 20:
        world.step()
    longest = INPUT_COST + 12 * OUTPUT_COST
    assert abs(world.fair_share.served("short") - world.fair_share.served("long")) <= longest


def test_the_adapters_of_a_tenant_share_what_it_gets() -> None:
    world = fair_world(rows=1)
    adapter_of = {}
    for adapter in ("a",) * 6 + ("b",) * 2 + (None,) * 2:
        # each takes more than a turn
        submitted = world.submit(max_tokens=int(ROW_TOKENS / OUTPUT_COST), adapter=adapter)
        adapter_of[submitted] = adapter or "base"
    for _ in range(2):
        world.stage()
    order = start_order(world, lambda request_id: adapter_of[request_id])
    assert Counter(order[:6]) == {"a": 2, "b": 2, "base": 2}


def test_a_queue_whose_adapter_runs_goes_first_until_its_turn_is_used_up() -> None:
    world = fair_world(rows=2, kv_blocks=4096)
    name_of = {}
    reply = int(2 * ROW_TOKENS / OUTPUT_COST / 4)
    for number, adapter in enumerate(("a",) * 12 + ("b",)):
        max_tokens = reply if number else reply // 2  # so that the two rows do not end together
        name_of[world.submit([1], max_tokens=max_tokens, adapter=adapter)] = adapter
    while world.loader.loads:
        world.stage()
    while not world.core.idle:
        world.step()
    order = [name_of[request_id] for request_id in world.finished]
    assert 4 <= order.index("b") <= 7


def test_a_tenant_has_no_more_with_many_adapters_than_another_with_one() -> None:
    world = fair_world(rows=1)
    tenant_of = {}
    for number in range(8):
        tenant_of[world.submit(adapter=f"adapter {number}", tenant="many")] = "many"
    for _ in range(8):
        tenant_of[world.submit(adapter="own", tenant="one")] = "one"
    while world.loader.loads:
        world.stage()
    order = start_order(world, lambda request_id: tenant_of[request_id])
    for count in range(2, 17, 2):
        assert abs(order[:count].count("many") - order[:count].count("one")) <= 1


def test_idle_time_gives_no_credit() -> None:
    world = fair_world(rows=1)
    for _ in range(10):
        world.submit(tenant="busy")
    for _ in range(15):
        world.step()
    late = {world.submit(tenant="late") for _ in range(10)}
    before = len(world.finished)
    world.run()
    order = [request_id in late for request_id in list(world.finished)[before:]]
    assert 3 <= sum(order[:8]) <= 5


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_of_a_tenant_run_than_may_and_others_take_the_rows(limit: int) -> None:
    world = fair_world(rows=4, max_tenant_running=limit)
    for _ in range(6):
        world.submit(tenant="limited")
    world.step()
    assert world.core.figures().requests_running == limit
    world.submit(tenant="another")
    world.step()
    assert world.core.figures().requests_running == limit + 1
    world.run()
    assert all(end.reason is FinishReason.LENGTH for end in world.finished.values())


def test_a_preempted_sequence_is_still_one_of_those_that_run() -> None:
    world = fair_world(rows=4, kv_blocks=8, max_tenant_running=2)
    for _ in range(2):
        world.submit([1] * 5, max_tokens=24, tenant="limited")
    third = world.submit([1], max_tokens=1, tenant="limited")
    while not world.core.figures().preemptions:
        world.step()
    assert third not in world.finished
    world.run()
    assert [*world.finished].index(third) > 0


def test_a_tenant_with_too_many_that_wait_gets_429_and_another_does_not() -> None:
    world = fair_world(rows=1, max_tenant_waiting=2)
    accepted = [world.submit(tenant="limited", max_tokens=20) for _ in range(3)]
    refused = world.submit(tenant="limited")
    failure = world.finished[refused].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (429, FailureKind.OVERLOADED)
    another = world.submit(tenant="another")
    assert another not in world.finished
    world.cancel(accepted[2])
    assert world.submit(tenant="limited") not in world.finished
    world.run()
    assert len(world.finished) == 5


def test_counters_of_tenants_that_are_gone_are_forgotten() -> None:
    world = fair_world(rows=4)
    for number in range(3 * FEW_COUNTERS):
        world.submit([1], max_tokens=1, tenant=f"tenant {number}", adapter=None)
        world.step()
    world.run()
    assert world.fair_share.counters <= 2 * FEW_COUNTERS


work = st.tuples(st.integers(1, 12), st.integers(1, 12))  # tokens of prompt and reply


@settings(max_examples=60, deadline=None)
@given(
    one=st.lists(work, min_size=12, max_size=24),
    another=st.lists(work, min_size=12, max_size=24),
    rows=st.integers(1, 4),
    preempting=st.booleans(),
)
def test_what_two_tenants_that_wait_were_served_differs_by_a_bound(
    one: list[tuple[int, int]], another: list[tuple[int, int]], rows: int, preempting: bool
) -> None:
    """Theorem 4.4 of the paper: twice what one prompt costs, or all that can run at once."""
    world = fair_world(
        rows=rows, kv_blocks=12 if preempting else 256, prefix_cache=False, step_tokens=STEP_TOKENS
    )
    for tenant, requests in (("one", one), ("another", another)):
        for prompt_tokens, max_tokens in requests:
            world.submit([1] * prompt_tokens, max_tokens=max_tokens, tenant=tenant)
    tenant_of = {number: request.tenant for number, request in world.requests.items()}
    bound = 2 * max(INPUT_COST * 12, OUTPUT_COST * rows * 24)
    while not world.core.idle:
        world.step()
        ended = Counter(tenant_of[request_id] for request_id in world.finished)
        if ended["one"] + rows < len(one) and ended["another"] + rows < len(another):
            assert abs(world.fair_share.served("one") - world.fair_share.served("another")) <= bound


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from((None, "x", "y", "z")), work),
        min_size=1,
        max_size=40,
    ),
    rows=st.integers(1, 4),
)
def test_no_row_is_left_free_while_somebody_could_run(
    requests: list[tuple[str, str | None, tuple[int, int]]], rows: int
) -> None:
    world = fair_world(rows=rows, kv_blocks=512, step_tokens=256)
    for tenant, adapter, (prompt_tokens, max_tokens) in requests:
        world.submit([1] * prompt_tokens, max_tokens=max_tokens, tenant=tenant, adapter=adapter)
    while world.loader.loads:
        world.stage()
    while world.worker.placing:
        world.arrive()
    world.step()  # which was sent before all were there
    while not world.core.idle:
        world.step()
        figures = world.core.figures()
        assert figures.requests_running == rows or not figures.requests_waiting


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), slots=st.integers(1, 2))
def test_nobody_is_passed_for_longer_than_the_bound(
    data: st.DataObject, rows: int, slots: int
) -> None:
    world = fair_world(rows=rows, slots=slots, max_overtaking_seconds=0.5)
    for _ in range(80):
        if data.draw(st.booleans()):
            tenant = data.draw(st.sampled_from(("one", "another")))
            world.submit(
                [1],
                max_tokens=data.draw(st.integers(1, 9)),
                adapter=tenant + data.draw(st.sampled_from("ab")),
                tenant=tenant,
            )
        while world.loader.loads:
            world.stage()
        if world.worker.steps:
            world.step()
        world.wait(data.draw(st.sampled_from((0.0, 0.1, 0.3))))
    world.run()
    assert world.watched.longest <= 0.5


class Tenant:
    """One tenant's requests, told to a policy by hand. All of a request is charged as it starts."""

    def __init__(self, rows: int = 1) -> None:
        self.policy = FairShare(max_overtaking_seconds=1.0, max_tenant_running=0, rows=ROWS)
        self.served = Counter[str]()
        self.now = 0.0
        self._rows = rows
        self._running: list[Request] = []
        self._asked = 0

    def ask(self, adapter: str) -> Request:
        self._asked += 1
        submit = Submit(self._asked, 0, 0.0, array("i", [1]).tobytes(), 1, adapter=key(adapter))
        request = Request(submit, order=self._asked, eos=frozenset())
        self.policy.join(request)
        return request

    def start(self, tokens: Mapping[str, int]) -> str:
        """The next of those that wait takes the row of the oldest; returns its adapter."""
        if len(self._running) == self._rows:
            self.policy.end(self._running.pop(0))
        request = self.policy.first(self.now)
        assert request is not None
        assert request.adapter is not None
        adapter = request.adapter.id
        self.policy.start(request, tokens[adapter], self.now)
        request.started = self.now
        self._running.append(request)
        self.served[adapter] += tokens[adapter]
        return adapter


tokens_of_a_request = st.integers(int(TURN / 20), int(3 * TURN))


@settings(deadline=None)
@given(one=tokens_of_a_request, another=tokens_of_a_request, rows=st.integers(1, 4))
def test_what_two_adapters_of_a_tenant_were_served_differs_by_a_bound(
    one: int, another: int, rows: int
) -> None:
    tenant = Tenant(rows)
    tokens = {"one": one, "another": another}
    for adapter in tokens:
        tenant.policy.admit(key(adapter))
        tenant.ask(adapter)
        tenant.ask(adapter)
    for _ in range(150):
        tenant.ask(tenant.start(tokens))  # so that both wait all the time
        difference = tenant.served["one"] - tenant.served["another"]
        assert abs(difference) <= 2 * (TURN + max(one, another))


@settings(deadline=None)
@given(
    tokens=st.dictionaries(st.sampled_from("abcdef"), tokens_of_a_request, min_size=1),
    before=st.integers(0, 30),
    rows=st.integers(1, 4),
)
def test_an_adapter_waits_for_no_more_than_two_turns_of_each_other_of_its_tenant(
    tokens: dict[str, int], before: int, rows: int
) -> None:
    tenant = Tenant(rows)
    tokens = {**tokens, "late": 1}
    for adapter in tokens:
        tenant.policy.admit(key(adapter))
        if adapter != "late":
            tenant.ask(adapter)
            tenant.ask(adapter)
    for _ in range(before):
        tenant.ask(tenant.start(tokens))
    tenant.ask("late")
    tenant.served.clear()
    while (adapter := tenant.start(tokens)) != "late":
        tenant.ask(adapter)
        assert tenant.served[adapter] <= 2 * (TURN + tokens[adapter])


@settings(deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(("one", "two", "three")), st.sampled_from("abcdefgh")),
        max_size=30,
    ),
    blocked=st.sets(st.sampled_from("abcdefgh")),
    served=st.integers(0, 10),
    most=st.integers(1, 8),
)
def test_those_without_room_are_given_by_their_turns(
    asked: list[tuple[str, str]], blocked: set[str], served: int, most: int
) -> None:
    policy = FairShare(max_overtaking_seconds=1.0, max_tenant_running=0, rows=ROWS)
    for order, (tenant, adapter) in enumerate(asked):
        submit = Submit(
            order, 0, 0.0, array("i", [1]).tobytes(), 1, adapter=key(adapter), tenant=tenant
        )
        policy.join(Request(submit, order=order, eos=frozenset()))
    for adapter in "abcdefgh":
        if adapter in blocked:
            policy.block(key(adapter))
        else:
            policy.admit(key(adapter))
    for number in range(served):
        request = policy.first(0.0)
        if request is not None:
            policy.start(request, 10 * number, 0.0)
            request.started = 0.0
    waited_for = {key(adapter) for _, adapter in asked if adapter in blocked}
    assert policy.blocked_in_turn(most) == sorted(waited_for, key=policy.turn)[:most]


def test_a_turn_rests_while_one_of_its_tenant_is_overdue() -> None:
    tenant = Tenant(rows=9)
    for adapter in ("turn", "turn", "turn", "before", "overdue"):
        tenant.ask(adapter)
    tenant.policy.block(key("overdue"))
    for adapter in ("turn", "before"):
        tenant.policy.admit(key(adapter))
    tokens = {"turn": 1, "before": 1}
    assert [tenant.start(tokens) for _ in range(2)] == ["turn", "turn"]
    tenant.now = 2.0
    assert tenant.start(tokens) == "before"
    assert tenant.policy.first(tenant.now) is None
