"""What administrators want of the scheduler, and when it is done."""

import pytest

from pipeline.messages import (
    MERGED,
    AdapterKey,
    AdminVerb,
    AliasesTaken,
    Failure,
    FailureKind,
    FinishReason,
    LoadAdapter,
    Merge,
    MergePart,
    MergeStrategy,
    Tier,
)
from tests.scheduler.fake_loader import NOT_FOUND
from tests.scheduler.world import World, key

LOAD, UNLOAD, PIN, UNPIN = AdminVerb.LOAD, AdminVerb.UNLOAD, AdminVerb.PIN, AdminVerb.UNPIN


def loaded(world: World, name: str = "sql", adapter: str = "a", *, nbytes: int = 512) -> None:
    """Give an adapter a name, to the end."""
    command = world.command(LOAD, name=name, adapter=adapter)
    if world.loader.loads:
        world.stage(nbytes=nbytes)
        world.arrive()
    world.take_names()
    assert world.done[command] is None


def pinned(world: World, adapter: str, *, nbytes: int = 512) -> Failure | None:
    command = world.command(PIN, adapter=adapter)
    world.stage(nbytes=nbytes)
    world.arrive()
    return world.done[command]


def failed(world: World, command: int) -> Failure:
    failure = world.done[command]
    assert failure is not None
    return failure


# --- load ---


def test_a_load_is_done_when_the_adapter_is_resident_and_all_frontends_know_its_name() -> None:
    world = World(frontends=2)
    command = world.command(LOAD, name="sql", adapter="a")
    assert world.to_loader() == [LoadAdapter(key("a"))]
    world.stage()
    assert world.names[0].names == {}
    world.arrive()
    assert [one.names for one in world.names] == [{"sql": key("a")}] * 2
    assert command not in world.done
    world.core.aliases_taken(AliasesTaken(1, 1))
    world.settle()
    assert command not in world.done, "the other frontend does not know yet"
    world.take_names()
    assert world.done == {command: None}
    assert world.list_adapters()["a"].tier == Tier.DEVICE


def test_a_load_of_what_is_resident_asks_nobody() -> None:
    world = World()
    world.submit(adapter="a")
    world.run()
    asked = len(world.to_loader())
    loaded(world)
    assert len(world.to_loader()) == asked


def test_a_load_that_fails_gives_no_name_and_says_why() -> None:
    world = World()
    command = world.command(LOAD, name="sql", adapter="a")
    world.fail_load()
    assert failed(world, command) == NOT_FOUND
    assert world.names[0].version == 0
    loaded(world)  # it can be tried again


def test_a_load_that_takes_too_long_fails_and_is_not_waited_for() -> None:
    world = World(adapter_load_seconds=10.0)
    command = world.command(LOAD, name="sql", adapter="a")
    assert world.core.next_deadline() == 10.0
    world.wait(10)
    assert failed(world, command).kind == FailureKind.ADAPTER_UNAVAILABLE
    world.stage()
    world.arrive()
    assert world.names[0].version == 0


def test_an_adapter_larger_than_the_pool_fails_its_load() -> None:
    world = World(pool_bytes=1024)
    command = world.command(LOAD, name="sql", adapter="a")
    world.stage(nbytes=2048)
    assert failed(world, command).kind == FailureKind.ADAPTER_INVALID


def test_a_name_is_given_once_unless_in_place() -> None:
    world = World()
    loaded(world)
    command = world.command(LOAD, name="sql", adapter="b")
    assert failed(world, command).status == 400
    assert failed(world, command).kind == FailureKind.NAME_TAKEN
    assert world.names[0].names == {"sql": key("a")}


def test_a_load_in_place_gives_the_name_to_another_adapter() -> None:
    world = World()
    loaded(world)
    command = world.command(LOAD, name="sql", adapter="b", in_place=True)
    world.forget()
    assert world.names[0].names == {"sql": key("a")}
    world.stage()
    world.arrive()
    assert world.names[0].names == {"sql": key("b")}
    world.take_names()
    assert world.done[command] is None


def test_a_load_in_place_of_the_same_adapter_reads_it_anew_when_nobody_runs_with_it() -> None:
    world = World()
    loaded(world)
    running = world.submit(adapter="a", max_tokens=3)
    command = world.command(LOAD, name="sql", adapter="a", in_place=True)
    waiting = world.submit(adapter="a", max_tokens=1)
    while running not in world.finished:
        assert world.loader.loads == []
        world.step()
    while world.worker.steps:
        world.step()
    world.forget()
    world.stage(content="a, version 2")
    world.arrive()
    world.take_names()
    assert world.done[command] is None
    world.run()
    assert world.finished[running].reason is FinishReason.LENGTH
    assert world.finished[waiting].reason is FinishReason.LENGTH
    assert world.list_adapters()["a"].loads == 2


def test_a_load_waits_for_room_until_somebody_has_ended() -> None:
    world = World(pool_bytes=1024)
    running = world.submit(adapter="big", max_tokens=8)
    world.stage(nbytes=1024)
    world.step()
    command = world.command(LOAD, name="sql", adapter="a")
    world.stage(nbytes=512)
    assert not world.worker.placing
    while running not in world.finished or world.worker.steps:
        world.step(arrivals=False)
    world.arrive()
    world.take_names()
    assert world.done[command] is None


# --- unload ---


def test_an_unload_takes_the_name_away_and_then_the_adapter_out_of_pool_and_arena() -> None:
    world = World()
    loaded(world)
    command = world.command(UNLOAD, name="sql")
    assert world.names[0].names == {}
    assert world.loader.forgets == []
    world.take_names()
    assert world.loader.forgets == [key("a")]
    assert world.core.figures().adapters_resident == 0
    assert command not in world.done
    world.forget()
    assert world.done[command] is None
    assert world.list_adapters()["a"].tier == Tier.DISK


def test_an_unload_waits_for_those_who_run_with_it() -> None:
    world = World()
    loaded(world)
    running = world.submit(adapter="a", max_tokens=4)
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    while world.worker.steps:
        assert world.loader.forgets == []
        world.step()
    assert running in world.finished
    world.forget()
    assert world.done[command] is None


def test_who_asks_for_it_by_its_id_meanwhile_has_it_loaded_anew_afterwards() -> None:
    world = World()
    loaded(world)
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    late = world.submit(adapter="a")
    assert world.loader.loads == []
    world.forget()
    assert world.done[command] is None
    assert [load.adapter for load in world.loader.loads] == [key("a")]
    world.run()
    assert world.finished[late].reason is FinishReason.LENGTH


def test_an_unload_waits_for_a_copy_that_is_on_its_way() -> None:
    world = World(pool_bytes=512)
    loaded(world)
    loaded(world, name="other", adapter="b")  # in its place
    world.prefetch("a")
    world.stage()
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    assert world.loader.forgets == []
    world.arrive()
    world.forget()
    assert world.done[command] is None


def test_nobody_starts_with_an_adapter_that_is_unloaded_while_it_arrives() -> None:
    world = World(pool_bytes=512)
    loaded(world)
    loaded(world, name="other", adapter="b")
    world.prefetch("a")
    world.stage()
    world.command(UNLOAD, name="sql")
    world.take_names()
    late = world.submit(adapter="a")
    assert not world.worker.steps
    world.arrive()
    world.forget()
    world.run()
    assert world.finished[late].reason is FinishReason.LENGTH


def test_an_unload_waits_for_a_load_that_is_on_its_way() -> None:
    world = World(pool_bytes=512)
    loaded(world)
    loaded(world, name="other", adapter="b")
    world.prefetch("a")
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    assert world.loader.forgets == []
    world.stage()
    assert not world.worker.placing
    world.forget()
    assert world.done[command] is None


def test_an_unload_waits_for_a_load_that_fails() -> None:
    world = World(pool_bytes=512)
    loaded(world)
    loaded(world, name="other", adapter="b")
    waiting = world.submit(adapter="a")
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    world.fail_load()
    assert world.finished[waiting].failure == NOT_FOUND
    world.forget()
    assert world.done[command] is None


def test_an_adapter_with_another_name_stays() -> None:
    world = World()
    loaded(world)
    loaded(world, name="again")
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    assert world.done[command] is None
    assert world.list_adapters()["a"].tier == Tier.DEVICE
    assert world.names[0].names == {"again": key("a")}


def test_a_load_that_comes_during_the_unload_follows_it() -> None:
    world = World()
    loaded(world)
    unload = world.command(UNLOAD, name="sql")
    world.take_names()
    by_name = world.command(LOAD, name="sql", adapter="a")
    by_other_name = world.command(LOAD, name="other", adapter="a")
    assert world.loader.loads == []
    world.forget()
    assert world.done == {1: None, unload: None}
    world.stage()
    world.arrive()
    world.take_names()
    assert (world.done[by_name], world.done[by_other_name]) == (None, None)


def test_an_unknown_name_cannot_be_unloaded() -> None:
    world = World()
    failure = failed(world, world.command(UNLOAD, name="sql"))
    assert (failure.status, failure.kind) == (404, FailureKind.NAME_UNKNOWN)


def test_what_the_arena_alone_holds_is_forgotten_too() -> None:
    world = World(pool_bytes=512)
    loaded(world, nbytes=512)
    loaded(world, name="other", adapter="b", nbytes=512)  # it takes the room of the first
    assert world.list_adapters()["a"].tier == Tier.HOST
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    assert world.loader.forgets == [key("a")]
    world.forget()
    assert world.done[command] is None


# --- pins ---


def test_a_pinned_adapter_is_not_evicted_until_it_is_unpinned() -> None:
    world = World(pool_bytes=1024)
    assert pinned(world, "a") is None
    assert world.list_adapters()["a"].pinned
    for adapter in ("b", "c"):
        world.submit(adapter=adapter)
        world.run()
        assert world.list_adapters()["a"].tier == Tier.DEVICE
    assert world.list_adapters()["b"].tier == Tier.HOST
    unpin = world.command(UNPIN, adapter="a")
    assert world.done[unpin] is None
    for adapter in ("b", "c"):
        world.submit(adapter=adapter)
        world.run()
    assert world.list_adapters()["a"].tier == Tier.HOST


def test_only_a_share_of_the_pool_can_be_pinned() -> None:
    world = World(pool_bytes=2048, pinned_pool_fraction=0.5)
    assert pinned(world, "a", nbytes=512) is None
    refused = pinned(world, "b", nbytes=768)
    assert refused is not None
    assert refused.status == 400
    assert "512 bytes" in refused.message
    assert "0.5 of the adapter pool" in refused.message
    assert pinned(world, "c", nbytes=512) is None
    figures = world.core.figures()
    assert (figures.adapters_pinned, figures.adapter_pool_pinned_bytes) == (2, 1024)


def test_what_cannot_fit_beside_the_pinned_ones_is_refused_and_holds_up_nobody() -> None:
    world = World(pool_bytes=1024)
    assert pinned(world, "a", nbytes=512) is None
    large = world.submit(adapter="large")
    world.stage(nbytes=1024)
    failure = world.finished[large].failure
    assert failure is not None
    assert failure.message.endswith("has 1024, of which 512 are pinned")


def test_what_waits_for_room_is_refused_when_a_pin_takes_it_for_good() -> None:
    world = World(pool_bytes=1024)
    running = world.submit(adapter="a", max_tokens=50)
    world.stage(nbytes=512)
    world.step()
    large = world.submit(adapter="large")
    world.stage(nbytes=1024)
    assert large not in world.finished
    assert world.done[world.command(PIN, adapter="a")] is None
    assert world.finished[large].reason is FinishReason.ERROR
    assert running not in world.finished


def test_pins_take_a_share_of_the_slots_at_most() -> None:
    world = World(slots=2)
    assert pinned(world, "a") is None
    assert pinned(world, "b") is not None


def test_pinning_twice_is_done_and_counts_once() -> None:
    world = World(pool_bytes=1024, pinned_pool_fraction=0.5)
    assert pinned(world, "a") is None
    assert world.done[world.command(PIN, adapter="a")] is None
    assert world.core.figures().adapter_pool_pinned_bytes == 512


def test_what_is_not_pinned_cannot_be_unpinned() -> None:
    world = World()
    assert failed(world, world.command(UNPIN, adapter="a")).status == 404


def test_a_load_can_pin_and_an_unload_takes_that_back() -> None:
    world = World()
    command = world.command(LOAD, name="sql", adapter="a", pinned=True)
    world.stage()
    world.arrive()
    world.take_names()
    assert world.done[command] is None
    assert world.list_adapters()["a"].pinned
    world.command(UNLOAD, name="sql")
    world.take_names()
    world.forget()
    assert not world.list_adapters()["a"].pinned


def test_a_pinned_adapter_moves_when_that_makes_room() -> None:
    world = World(pool_bytes=2048, pinned_pool_fraction=1.0)
    for adapter, nbytes in (("hole", 512), ("kept", 512), ("tail", 512)):
        world.submit(adapter=adapter, max_tokens=1)
        world.stage(nbytes=nbytes)
        world.run()
    assert world.done[world.command(PIN, adapter="kept")] is None
    world.submit(adapter="large", max_tokens=1)
    world.stage(nbytes=1536)
    world.run()
    listed = world.list_adapters()
    assert (listed["kept"].tier, listed["large"].tier) == (Tier.DEVICE, Tier.DEVICE)


# --- the list, and commands about the same ---


def test_the_list_tells_who_runs_and_who_waits() -> None:
    world = World(rows=1)
    world.submit(adapter="a")
    world.submit(adapter="a")
    world.stage(nbytes=512)
    world.arrive()
    world.now = 7.0
    listed = world.list_adapters()["a"]
    assert (listed.running, listed.waiting, listed.pins > 0) == (1, 1, True)
    assert (listed.nbytes, listed.rank, listed.loads) == (512, 8, 1)
    assert listed.idle_seconds == 7.0


@pytest.mark.parametrize("adapter", ["a", "b"])
def test_commands_about_one_name_are_done_one_after_the_other(adapter: str) -> None:
    world = World()
    first = world.command(LOAD, name="sql", adapter="a")
    second = world.command(LOAD, name="sql", adapter=adapter)
    unload = world.command(UNLOAD, name="sql")
    world.stage()
    world.arrive()
    world.take_names()
    assert world.done[first] is None
    assert failed(world, second).status == 400
    world.take_names()
    world.forget()
    assert world.done[unload] is None


def test_resident_adapters_are_told_by_their_names_or_ids() -> None:
    world = World()
    loaded(world)
    world.submit(adapter="b")
    world.stage()
    world.arrive()
    world.prefetch("nobody waits for this")
    world.submit(adapter="c")
    resident, waiting = world.core.adapter_names()
    assert sorted(resident) == ["b", "sql"]
    assert waiting == ["c"]


def test_what_no_request_can_name_is_not_told_and_a_revision_is() -> None:
    world = World()
    part = AdapterKey("hub", "x")
    merge = Merge(parts=(MergePart(part, 0.5),), strategy=MergeStrategy.LINEAR)
    for adapter in (
        AdapterKey(MERGED, "linear(x*0.5)", merge=merge),
        AdapterKey("hub", "org/x", "v1"),
    ):
        world.submit(adapter=adapter)
        world.run()
    assert world.core.adapter_names() == (["org/x@v1"], [])


def test_an_adapter_that_is_unloaded_while_it_is_in_doubt_and_without_room_comes_anew() -> None:
    world = World(pool_bytes=512, adapter_revalidate_seconds=0)
    loaded(world)
    loaded(world, name="other", adapter="b")  # in its place
    running = world.submit(adapter="b", max_tokens=30)
    world.stage()
    waiting = [world.submit(adapter="a")]
    world.stage()  # the one that runs has the pool
    waiting.append(world.submit(adapter="a"))  # has its source asked, and waits for the answer
    command = world.command(UNLOAD, name="sql")
    world.take_names()
    world.run()
    assert world.done[command] is None
    assert {world.finished[one].reason for one in (running, *waiting)} == {FinishReason.LENGTH}
