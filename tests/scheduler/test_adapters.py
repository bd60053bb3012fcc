"""Adapters: loaded once, passed by others, placed, pinned, evicted; leases always come back."""

from pipeline.messages import AdapterKey, FailureKind, FinishReason, LoadAdapter, ReleaseAdapter
from scheduler.adapters import MAX_BYTES_AHEAD, MAX_BYTES_ARRIVING
from scheduler.loads import MAX_LOADS
from tests.scheduler.fake_loader import NOT_FOUND
from tests.scheduler.fake_worker import BASE, reply
from tests.scheduler.world import SETTINGS, World, key

OVERTAKING_SECONDS = SETTINGS.max_overtaking_seconds
HALF = 2048  # bytes; of the pool of a World


def loads(world: World) -> list[AdapterKey]:
    """Every adapter that the loader was ever asked for."""
    return [message.adapter for message in world.to_loader() if isinstance(message, LoadAdapter)]


def make_resident(world: World, *adapters: str, nbytes: int = 512) -> None:
    for adapter in adapters:
        world.submit(adapter=adapter, max_tokens=1)
        world.stage(nbytes=nbytes)
        world.run()


def test_a_request_waits_for_its_adapter_and_others_pass_it() -> None:
    world = World()
    with_adapter = world.submit(adapter="sql")
    base = world.submit()
    assert world.to_loader() == [LoadAdapter(key("sql"))]
    while world.worker.steps:
        world.step()
    assert list(world.finished) == [base]
    world.stage()
    world.run()
    assert world.tokens[with_adapter] == reply("sql", [1, 2, 3], 4, ignore_eos=True)


def test_an_adapter_is_asked_for_once_whoever_wants_it() -> None:
    world = World()
    world.prefetch("sql")
    world.submit(adapter="sql")
    world.submit(adapter="sql")
    world.prefetch("sql")
    assert loads(world) == [key("sql")]
    world.run()
    world.submit(adapter="sql")
    world.run()
    assert loads(world) == [key("sql")]


def test_the_first_step_with_an_adapter_does_not_wait_for_its_copy() -> None:
    world = World()
    world.submit(adapter="sql")
    world.stage(nbytes=700)
    (placing,) = world.worker.placing
    assert (placing.copy.slot, placing.copy.pool_offset, placing.copy.nbytes) == (0, 0, 700)
    assert world.worker.steps[0].new_rows[0].slot == 0


def test_a_copy_does_not_wait_for_a_step_in_flight_to_end() -> None:
    world = World()
    world.submit(max_tokens=20)
    assert len(world.worker.steps) == 2
    world.submit(adapter="sql")
    world.stage()
    assert len(world.worker.placing) == 1
    world.step(arrivals=False)
    assert world.worker.steps[-1].new_rows[0].slot == 0


def test_a_prefetched_adapter_is_copied_without_a_step() -> None:
    world = World()
    world.prefetch("sql")
    world.stage()
    assert len(world.worker.placing) == 1
    assert not world.worker.steps
    world.run()
    assert world.core.figures().adapters_resident == 1


def test_a_step_is_not_held_up_by_the_copies_ahead_of_that_of_its_adapter() -> None:
    large = MAX_BYTES_AHEAD + 1
    world = World(pool_bytes=4 * large)
    for name in ("small", "large", "late"):
        world.submit(adapter=name)
    for nbytes in (256, large, 256):
        world.stage(nbytes=nbytes)
    for _ in range(4):
        world.step(arrivals=False)
    slots = [new.slot for step in world.worker.run_steps for new in step.new_rows]
    assert slots == [0, 1]
    world.arrive()
    world.arrive()
    while world.worker.steps:
        world.step()
    assert all(len(tokens) == 4 for tokens in world.tokens.values())


def test_no_more_adapters_get_room_than_are_copied_soon() -> None:
    nbytes = MAX_BYTES_ARRIVING // 2
    world = World(pool_bytes=8 * nbytes)
    for number in range(4):
        world.submit(adapter=f"adapter {number}")
    while world.loader.loads:
        world.stage(nbytes=nbytes)
    assert len(world.worker.placing) == 2
    world.arrive()
    assert len(world.worker.placing) == 2
    world.run()
    assert len(world.worker.placements) == 4


def test_the_lease_goes_back_when_the_copy_is_done() -> None:
    world = World()
    world.submit(adapter="sql")
    world.stage()
    world.step(arrivals=False)
    assert world.loader.leases
    world.arrive()
    assert not world.loader.leases
    assert isinstance(world.to_loader()[-1], ReleaseAdapter)


def test_an_adapter_is_not_evicted_while_it_arrives() -> None:
    world = World(slots=1)
    world.prefetch("a")
    world.stage()
    world.submit(adapter="b")
    world.stage()
    assert len(world.worker.placements) == 1
    world.arrive()
    assert len(world.worker.placements) == 2
    world.run()


def test_the_arena_is_attached_before_the_first_copy() -> None:
    world = World(started=False)
    world.submit(adapter="sql")
    world.worker_ready()
    assert not world.arena_attached
    world.arena_ready()
    assert world.arena_attached
    world.run()


def test_rows_of_many_adapters_share_a_step() -> None:
    world = World()
    requests = {name: world.submit(adapter=name, max_tokens=6) for name in ("a", "b", "c")}
    requests[BASE] = world.submit(max_tokens=6)
    world.run()
    for name, request in requests.items():
        assert world.tokens[request] == reply(name, [1, 2, 3], 6, ignore_eos=True)
    assert any(len(step.decode_rows) == 4 * 4 for step in world.worker.run_steps)


def test_a_failed_load_fails_those_that_wait_for_it_and_nobody_else() -> None:
    world = World()
    failing = [world.submit(adapter="nowhere") for _ in range(2)]
    other = world.submit(max_tokens=2)
    world.fail_load()
    world.run()
    assert [world.finished[request].failure for request in failing] == [NOT_FOUND, NOT_FOUND]
    assert world.finished[other].reason is FinishReason.LENGTH


def test_an_adapter_that_failed_is_asked_for_again_by_the_next_request() -> None:
    world = World()
    world.submit(adapter="late")
    world.fail_load()
    again = world.submit(adapter="late")
    world.run()
    assert world.finished[again].reason is FinishReason.LENGTH


def test_an_adapter_larger_than_the_pool_fails_its_requests() -> None:
    world = World(pool_bytes=4096)
    request = world.submit(adapter="huge")
    world.stage(nbytes=4097)
    failure = world.finished[request].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (422, FailureKind.ADAPTER_INVALID)
    assert "takes 4097 bytes, the adapter pool has 4096" in failure.message
    assert not world.loader.leases


def test_a_load_that_takes_too_long_fails_its_requests_with_503() -> None:
    world = World(adapter_load_seconds=5)
    request = world.submit(adapter="slow")
    assert world.core.next_deadline() == 5
    world.wait(5)
    failure = world.finished[request].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (503, FailureKind.ADAPTER_UNAVAILABLE)
    assert world.core.next_deadline() is None


def test_an_adapter_that_comes_too_late_is_kept_for_the_next_request() -> None:
    world = World(adapter_load_seconds=5)
    world.submit(adapter="slow")
    world.wait(5)
    again = world.submit(adapter="slow")
    assert len(world.loader.loads) == 1
    assert world.core.next_deadline() == 10
    world.stage()
    world.run()
    assert world.finished[again].reason is FinishReason.LENGTH
    assert not world.loader.leases


def test_an_adapter_whose_requests_were_cancelled_is_still_placed() -> None:
    world = World()
    world.cancel(world.submit(adapter="sql"))
    world.stage()
    world.run()
    assert world.core.figures().adapters_resident == 1
    assert not world.loader.leases


def test_the_adapter_used_longest_ago_is_evicted() -> None:
    world = World(slots=2)
    make_resident(world, "a", "b")
    world.submit(adapter="a")  # so that b is older
    world.run()
    make_resident(world, "c")
    world.submit(adapter="a")
    assert loads(world) == [key("a"), key("b"), key("c")]
    world.submit(adapter="b")
    assert loads(world)[-1] == key("b")
    world.run()


def test_an_adapter_in_use_is_not_evicted_and_the_waiting_one_keeps_its_lease() -> None:
    world = World(slots=1)
    running = world.submit(adapter="a", max_tokens=20)
    world.stage()
    waiting = world.submit(adapter="b")
    world.stage()
    world.step()
    assert list(world.loader.leases.values()) == [key("b")]
    world.run()
    assert list(world.finished) == [running, waiting]
    assert not world.loader.leases


def test_an_adapter_is_not_overwritten_while_a_surplus_row_in_flight_uses_it() -> None:
    world = World(slots=1)
    running = world.submit(adapter="a", max_tokens=20)
    world.stage()
    world.submit(adapter="b")
    world.stage()
    world.step()
    world.cancel(running)
    world.step()  # the step in flight when it was cancelled is still to come
    assert len(world.worker.placements) == 1
    world.step()
    assert len(world.worker.placements) == 2
    world.run()


def test_a_staged_adapter_that_nobody_waits_for_any_more_gives_its_lease_back() -> None:
    world = World(slots=1)
    world.submit(adapter="a", max_tokens=20)
    world.stage()
    world.step()
    waiting = world.submit(adapter="b")
    world.stage()
    world.cancel(waiting)
    assert not world.loader.leases
    world.run()


def test_a_prefetched_adapter_without_room_gives_its_lease_back() -> None:
    world = World(slots=1)
    world.submit(adapter="a", max_tokens=20)
    world.stage()
    world.step()
    world.prefetch("b")
    world.stage()
    world.step()
    assert not world.loader.leases
    world.run()


def test_a_prefetched_adapter_does_not_push_out_one_that_is_waited_for() -> None:
    world = World(slots=1, rows=1)
    make_resident(world, "a")
    world.submit(max_tokens=12)
    waiting = world.submit(adapter="a")
    world.prefetch("b")
    world.stage()
    world.run()
    assert loads(world) == [key("a"), key("b")]
    assert world.finished[waiting].reason is FinishReason.LENGTH


def test_an_adapter_that_has_got_room_is_used_before_it_makes_room_for_an_older_request() -> None:
    world = World(slots=1, rows=1)
    world.submit(max_tokens=30)
    older = world.submit(adapter="a")
    later = world.submit(adapter="b")
    world.stage(1)  # b is there first
    world.step()
    world.step()
    world.stage(0)
    world.run()
    assert loads(world) == [key("a"), key("b")]
    assert list(world.finished)[1:] == [later, older]


def test_the_older_request_takes_the_room_of_a_used_adapter_that_a_later_one_waits_for() -> None:
    world = World(slots=1, rows=1)
    make_resident(world, "b")
    world.submit(max_tokens=30)
    older = world.submit(adapter="a")
    later = world.submit(adapter="b")
    world.stage()
    world.run()
    assert loads(world) == [key("b"), key("a"), key("b")]
    assert list(world.finished)[2:] == [older, later]


def test_one_that_needs_much_room_is_not_passed_for_ever() -> None:
    world = World(pool_bytes=2 * HALF)
    world.submit(adapter="a", max_tokens=30)
    world.stage(nbytes=HALF)
    large = world.submit(adapter="large")
    world.stage(nbytes=2 * HALF)
    for count in range(80):
        if count % 10 == 0:  # so that a is in use all the time
            world.submit(adapter="a", max_tokens=30)
            world.wait(OVERTAKING_SECONDS / 2)
        world.step()
        if large in world.finished:
            break
    assert world.finished[large].reason is FinishReason.LENGTH
    world.run()


def test_the_base_model_passes_one_that_needs_much_room() -> None:
    world = World(pool_bytes=HALF)
    running = world.submit(adapter="a", max_tokens=30)
    world.stage(nbytes=HALF)
    large = world.submit(adapter="large")
    world.stage(nbytes=HALF)
    passes = world.submit(adapter="a", max_tokens=2)
    world.step()
    world.wait(OVERTAKING_SECONDS)
    base = world.submit(max_tokens=2)
    also_a = world.submit(adapter="a", max_tokens=9)
    world.run()
    assert list(world.finished) == [passes, base, running, large, also_a]


def test_small_adapters_do_not_take_the_room_that_a_large_one_waits_for() -> None:
    world = World(pool_bytes=2 * HALF)
    running = world.submit(adapter="a", max_tokens=30)
    world.stage(nbytes=HALF)
    large = world.submit(adapter="large")
    world.stage(nbytes=2 * HALF)
    passes = world.submit(adapter="a", max_tokens=2)
    world.step()
    world.wait(OVERTAKING_SECONDS)
    small = world.submit(adapter="small")
    world.stage(nbytes=HALF)
    world.run()
    assert list(world.finished) == [passes, running, large, small]
    assert loads(world).count(key("small")) == 1


def test_a_small_adapter_gets_room_behind_large_ones_that_have_none() -> None:
    world = World(pool_bytes=2 * HALF)
    world.submit(adapter="a", max_tokens=30)
    world.stage(nbytes=HALF)
    for adapter in ("large", "as large"):
        world.submit(adapter=adapter)
        world.stage(nbytes=2 * HALF)
    small = world.submit(adapter="small")
    world.stage(nbytes=HALF)
    world.run()
    assert next(iter(world.finished)) == small


def test_room_is_found_when_the_one_it_was_kept_for_is_cancelled() -> None:
    world = World(slots=1, rows=1)
    make_resident(world, "a")
    running = world.submit(max_tokens=30)
    older = world.submit(adapter="a")
    world.submit(adapter="b")
    world.stage()
    world.step()
    world.step()
    assert world.loader.leases
    world.cancel(older)
    while world.loader.leases:
        world.step()
    assert running not in world.finished
    world.run()


def test_a_request_does_not_go_on_with_other_bytes_under_the_same_name() -> None:
    world = World(kv_blocks=9, block_tokens=4, slots=1, prefix_cache=False)
    world.submit([1] * 5, max_tokens=28)
    preempted = world.submit([2] * 5, adapter="sql", max_tokens=28)
    world.stage()
    poet = world.submit([3], adapter="poet", max_tokens=2)
    world.stage()
    world.submit([2], adapter="sql", max_tokens=1)  # passes poet
    world.step()
    world.wait(OVERTAKING_SECONDS)
    while world.core.figures().preemptions == 0:
        world.step()
    while not world.loader.loads:  # poet takes the only slot
        world.step()
    world.stage(content="sql, second edition")
    world.run()
    assert world.finished[poet].reason is FinishReason.LENGTH
    failure = world.finished[preempted].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (503, FailureKind.ADAPTER_UNAVAILABLE)
    produced = world.tokens[preempted]
    assert produced == reply("sql", [2] * 5, len(produced), ignore_eos=True)


def test_a_tenant_that_wants_many_adapters_has_a_bounded_number_of_loads_at_a_time() -> None:
    world = World(pool_bytes=100 * 512, slots=100)
    flood = [f"flood {number}" for number in range(MAX_LOADS + 8)]
    requests = [world.submit(adapter=adapter, tenant="flood") for adapter in flood]
    assert loads(world) == [key(adapter) for adapter in flood[:MAX_LOADS]]
    world.submit(adapter="victim", tenant="victim")
    assert loads(world)[-1] == key("victim")
    world.cancel(requests[MAX_LOADS])
    world.stage()
    assert loads(world)[-1] == key(flood[MAX_LOADS + 1])
    world.fail_load()
    assert loads(world)[-1] == key(flood[MAX_LOADS + 2])
    world.run()
    assert len(world.finished) == len(flood)


def test_an_adapter_that_another_tenant_wants_as_well_is_asked_for_on_its_account() -> None:
    world = World(pool_bytes=100 * 512, slots=100)
    for number in range(MAX_LOADS):
        world.submit(adapter=f"flood {number}", tenant="flood")
    shared = world.submit(adapter="shared", tenant="flood")
    assert key("shared") not in loads(world)
    world.submit(adapter="shared", tenant="victim")
    assert loads(world)[-1] == key("shared")
    world.run()
    assert loads(world).count(key("shared")) == 1
    assert world.finished[shared].reason is FinishReason.LENGTH


def test_what_has_not_been_asked_for_is_not_overdue_and_a_prefetch_of_it_is_not_either() -> None:
    world = World(pool_bytes=100 * 512, slots=100)
    for number in range(MAX_LOADS):
        world.submit(adapter=f"flood {number}", max_tokens=1)
    late = world.submit(adapter="late", max_tokens=1)
    world.prefetch("too many")
    world.wait(99.0)
    for _ in range(MAX_LOADS):
        world.stage()
    world.wait(99.0)
    world.run()
    assert world.finished[late].reason is FinishReason.LENGTH
    assert key("too many") not in loads(world)


def fragmented(world: World, *, running: bool) -> dict[str, int]:
    """Four adapters fill the pool; a and c are the ones used longest ago. Returns the requests
    that run with b and d."""
    for name in ("a", "c", "b", "d"):
        world.prefetch(name)
    for name in ("a", "b", "c", "d"):
        names = [load.adapter.id for load in world.loader.loads]
        world.stage(names.index(name), nbytes=HALF // 2)
    world.run()
    for name in ("c", "b", "d"):
        world.prefetch(name)
    requests = {name: world.submit(adapter=name, max_tokens=30) for name in ("b", "d") if running}
    while len(world.worker.run_steps) < 3 and running:
        world.step()
    return requests


def test_idle_adapters_are_moved_where_room_is_not_in_a_row() -> None:
    world = World(pool_bytes=2 * HALF)
    fragmented(world, running=False)
    large = world.submit(adapter="large")
    world.stage(nbytes=HALF)
    (placing,) = world.worker.placing
    assert [(move.slot, move.in_use) for move in placing.moves] == [(1, False)]
    assert world.core.figures().adapters_resident == 3
    world.run()
    assert world.tokens[large] == reply("large", [1, 2, 3], 4, ignore_eos=True)
    world.submit(adapter="b")
    assert loads(world).count(key("b")) == 1
    world.run()


def test_adapters_in_use_are_moved_if_there_is_no_other_way() -> None:
    world = World(pool_bytes=2 * HALF)
    requests = fragmented(world, running=True)
    large = world.submit(adapter="large")
    world.stage(nbytes=HALF)
    (placing,) = world.worker.placing
    assert [(move.slot, move.in_use) for move in placing.moves] == [(1, True)]
    world.run()
    for name, request in {**requests, "large": large}.items():
        tokens = world.tokens[request]
        assert tokens == reply(name, [1, 2, 3], len(tokens), ignore_eos=True)


def test_adapters_in_use_are_not_moved_for_one_that_nobody_waits_for() -> None:
    world = World(pool_bytes=2 * HALF)
    fragmented(world, running=True)
    world.prefetch("large")
    world.stage(nbytes=HALF)
    assert not world.worker.placing
    world.run()


def test_a_move_does_not_count_as_a_use() -> None:
    world = World(pool_bytes=2 * HALF)
    fragmented(world, running=False)
    world.prefetch("large")
    world.stage(nbytes=HALF)
    world.arrive()  # b has been moved, d has not
    world.prefetch("e")
    world.stage(nbytes=HALF // 2)
    world.run()
    world.prefetch("d")
    assert loads(world).count(key("d")) == 1
    world.prefetch("b")
    assert loads(world).count(key("b")) == 2
    world.run()
