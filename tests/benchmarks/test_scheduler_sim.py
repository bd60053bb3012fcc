"""The simulation of the scheduler: its clock, device, workload, rivals and figures."""

import xml.etree.ElementTree
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scheduler_sim import POLICIES
from benchmarks.scheduler_step import LOADS, ROWS, Load, Loop
from benchmarks.simulation import cost
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.measured import jain
from benchmarks.simulation.plot import draw
from benchmarks.simulation.policies import FirstComeFirstServed, TimeSlices
from benchmarks.simulation.rows import Rows
from benchmarks.simulation.run import Run
from benchmarks.simulation.workload import Request, Scenario, Stream, requests, scenarios
from pipeline.messages import AdapterKey, NewRow, Sampling, Step, Submit
from scheduler.policy import Policy
from scheduler.sequence import Sequence

A, B = AdapterKey("local", "a"), AdapterKey("local", "b")


def sequence(order: int, key: AdapterKey) -> Sequence:
    submit = Submit(order, 0, 0.0, array("i", [1]).tobytes(), 1, adapter=key)
    return Sequence(submit, order=order, eos=frozenset())


def start(policy: Policy, one: Sequence, now: float) -> None:
    policy.start(one, 1, now)
    one.started = now


def test_events_happen_in_the_order_of_their_times() -> None:
    clock, seen = Clock(), list[str]()
    for time, name in ((2.0, "late"), (1.0, "early"), (1.0, "early too")):
        clock.at(time, lambda name=name: seen.append(name))  # type: ignore[misc]
    while clock.advance():
        pass
    assert seen == ["early", "early too", "late"]
    assert clock.now == 2.0


@pytest.mark.parametrize(
    ("adapters", "seconds"), [(0, 5.97e-3), (8, 6.9e-3), (32, 7.6e-3), (64, 8.3e-3), (128, 9.9e-3)]
)
def test_a_decode_step_of_128_rows_takes_what_was_measured(adapters: int, seconds: float) -> None:
    found = cost.step_seconds(rows=128, kv_tokens=128 * 192, adapters=adapters, prompt_tokens=0)
    assert found == pytest.approx(seconds, rel=0.01)


def test_a_prefill_of_4096_tokens_takes_90_ms() -> None:
    found = cost.step_seconds(rows=0, kv_tokens=0, adapters=0, prompt_tokens=4096)
    assert found == pytest.approx(0.09, rel=0.01)


def test_the_row_table_counts_what_is_in_a_step() -> None:
    rows = Rows(4)
    prompt = array("i", [1] * 6).tobytes()
    new = tuple(
        NewRow(row, slot, prompt, 6, 0, b"", Sampling(), None) for row, slot in ((0, 5), (2, -1))
    )
    chunks = array("i", [0, 0, 6, 2, 0, 4]).tobytes()
    first = rows.apply(Step(1, prefill=chunks, new_rows=new))
    assert first == (0, 0, 1, 10, 1)  # the second prompt has tokens to go
    second = rows.apply(
        Step(2, decode_rows=array("i", [0]).tobytes(), prefill=array("i", [2, 4, 2]).tobytes())
    )
    assert second == (1, 7, 1, 2, 2)


def test_each_adapter_is_of_one_tenant_and_the_first_is_the_most_popular() -> None:
    stream = Stream(("x", "y", "z"), 30, 1.0, 10.0)
    found = requests(Scenario("one", 1.0, (stream,)), 5000)
    assert [one.arrival for one in found] == sorted(one.arrival for one in found)
    owners = {(one.adapter, one.tenant) for one in found}
    assert len(owners) == len({adapter for adapter, _ in owners})
    assert Counter(one.adapter for one in found).most_common(1)[0][0] == "x/0"
    assert len(found) / found[-1].arrival == pytest.approx(10.0, rel=0.1)


def test_a_bursty_stream_is_silent_between_its_bursts() -> None:
    stream = Stream(("x",), 3, 0.0, 20.0, sends=(60.0, 10.0))
    found = requests(Scenario("one", 1.0, (stream,)), 1000)
    assert all(one.arrival % 60 <= 10 for one in found)
    assert found[-1].arrival > 120


def test_the_scenarios_share_all_requests() -> None:
    assert sum(scenario.share for scenario in scenarios(50.0)) == pytest.approx(1.0)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=20))
def test_jains_index_is_between_one_share_and_one(numbers: list[float]) -> None:
    assert 1 / len(numbers) - 1e-9 <= jain(numbers) <= 1 + 1e-9


def test_jains_index_is_one_when_all_have_the_same_and_a_share_when_one_has_all() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([3.0, 0.0, 0.0]) == pytest.approx(1 / 3)


def test_first_come_first_served_starts_the_oldest_that_can_start() -> None:
    policy = FirstComeFirstServed()
    older, newer = sequence(1, A), sequence(2, B)
    policy.join(older)
    policy.join(newer)
    policy.admit(B)
    assert policy.first(0.0) is newer
    policy.admit(A)
    assert policy.first(0.0) is older


def test_an_adapter_in_line_starts_only_once_another_has_left() -> None:
    policy = TimeSlices(active_adapters=1)
    one, two = sequence(1, A), sequence(2, B)
    for key, waits in ((A, one), (B, two)):
        policy.join(waits)
        policy.block(key)
        policy.admit(key)
    assert policy.first(0.0) is one
    start(policy, one, 0.0)
    assert policy.first(1.0) is None  # b is resident, but a runs
    policy.end(one)
    assert policy.first(1.0) is two


def test_a_time_slice_ends_while_requests_still_wait_for_the_adapter() -> None:
    policy = TimeSlices(active_adapters=1, slice_seconds=2.0)
    for order, key in ((1, A), (2, A), (3, B)):
        policy.join(sequence(order, key))
        policy.block(key)
        policy.admit(key)
    assert policy.first(0.0) is not None
    before, after = policy.first(1.9), policy.first(2.1)
    assert before is not None
    assert after is not None
    assert (before.adapter, after.adapter) == (A, B)


def test_the_first_in_line_holds_up_those_behind_it_until_it_is_fetched() -> None:
    policy = TimeSlices(active_adapters=2)
    policy.join(sequence(1, A))
    policy.join(sequence(2, B))
    policy.block(B)
    policy.admit(B)
    assert policy.first(0.0) is None
    policy.block(A)
    first = policy.first(0.0)
    assert first is not None
    assert first.adapter == B  # which can start, while a is copied


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scenario", scenarios(50.0), ids=lambda scenario: scenario.name)
def test_every_request_is_served_or_refused_under_every_policy(
    policy: str, scenario: Scenario
) -> None:
    asked = requests(scenario, 400)
    run = Run(POLICIES[policy](), asked)
    run.run()
    assert len(run.outcomes) + run.refused == len(asked)
    figures = run.figures(scenario.suspects)
    tokens = sum(one.prompt_tokens + one.output_tokens for one in asked)
    if not run.refused:
        assert figures["tokens_per_second"] * figures["seconds"] == pytest.approx(tokens)
    row = {"scenario": scenario.name, "policy": policy, **figures}
    xml.etree.ElementTree.fromstring(draw([row]))


def test_a_request_alone_takes_its_load_its_prefill_and_its_steps() -> None:
    run = Run(POLICIES["fair share"](), [Request(0.0, "x", "a", 100, 1)])
    run.run()
    pack = cost.ADAPTER_BYTES / cost.PACK_BYTES_PER_SECOND
    copy = cost.ADAPTER_BYTES / cost.COPY_BYTES_PER_SECOND
    step = cost.step_seconds(rows=0, kv_tokens=0, adapters=1, prompt_tokens=100)
    least = cost.OPEN_SECONDS + pack + max(copy, step)  # layer by layer, beside the copy
    assert run.outcomes[0].first_token_seconds == pytest.approx(least)
    assert not run.outcomes[0].hot


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_the_steps_that_are_timed_have_their_rows_filled(load: Load) -> None:
    loop = Loop(load)
    for _ in range(100):
        loop.step()
    assert loop.running > 0.7 * ROWS
