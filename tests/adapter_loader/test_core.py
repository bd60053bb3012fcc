"""The loader's core, driven by hand: what is fetched, staged, leased and answered."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_loader.core import Core, Discard, Identity, StartFetch, StartPack
from pipeline.arena import ALIGNMENT as PAGE
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    Failure,
    FailureKind,
    ForgetAdapter,
    Lease,
    Leased,
    LoadAdapter,
    ReleaseAdapter,
)

BROKEN = Failure(422, FailureKind.ADAPTER_INVALID, "broken")


def key(name: str) -> AdapterKey:
    return AdapterKey("local", name)


def core(pages: int = 4, load_seconds: float = 10) -> Core:
    return Core(arena_bytes=pages * PAGE, load_seconds=load_seconds)


def load(loader: Core, name: str = "a", now: float = 0, token: str | None = None) -> None:
    loader.load(LoadAdapter(key(name), token), now)


def fetched(loader: Core, name: str = "a", pages: int = 1, identity: Identity = (1,)) -> None:
    loader.fetched(key(name), identity, pages * PAGE, b"ranks")


def stage(loader: Core, name: str = "a", pages: int = 1, identity: Identity = (1,)) -> int:
    """Load an adapter to its end; its offset in pages. It holds one lease."""
    load(loader, name)
    fetched(loader, name, pages, identity)
    loader.packed(key(name), f"{name} {identity}")
    loader.take_actions()
    (answer,) = [one for one in loader.take_outbox() if isinstance(one, AdapterStaged)]
    return answer.arena_offset // PAGE


def release(loader: Core, name: str, page: int) -> bool:
    return loader.release(ReleaseAdapter(key(name), page * PAGE))


def forget(loader: Core, name: str = "a") -> None:
    loader.forget(ForgetAdapter(key(name)))


def staged(name: str, page: int, pages: int = 1, identity: Identity = (1,)) -> AdapterStaged:
    return AdapterStaged(key(name), f"{name} {identity}", page * PAGE, pages * PAGE, b"ranks")


def failures(loader: Core) -> list[Failure]:
    answers = loader.take_outbox()
    return [answer.failure for answer in answers if isinstance(answer, AdapterFailed)]


def test_a_load_is_fetched_then_given_room_then_packed_then_answered() -> None:
    loader = core()
    load(loader, token="secret")
    assert loader.take_actions() == [StartFetch(key("a"), "secret", None)]
    fetched(loader, pages=2)
    assert loader.take_actions() == [StartPack(key("a"), 0, 2 * PAGE)]
    assert loader.take_outbox() == []
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [staged("a", 0, pages=2)]
    assert loader.take_actions() == []
    assert (loader.staged, loader.used_bytes) == (1, 2 * PAGE)


def test_a_token_does_not_show_in_the_text_of_an_action() -> None:
    assert "secret" not in repr(StartFetch(key("a"), "secret", None))


def test_a_remote_failure_is_remembered_for_a_short_time_and_for_its_tenant_alone() -> None:
    loader = Core(arena_bytes=PAGE, load_seconds=10, remember_seconds=5)
    mine, theirs = (AdapterKey("http", "https://h/x", scope=scope) for scope in ("me", "them"))
    loader.load(LoadAdapter(mine), 0)
    loader.take_actions()
    loader.failed(mine, BROKEN, 1)
    loader.load(LoadAdapter(mine), 5)
    assert loader.take_actions() == []
    assert failures(loader) == [BROKEN, BROKEN]
    loader.load(LoadAdapter(theirs), 5)
    loader.load(LoadAdapter(mine), 6)
    assert loader.take_actions() == [StartFetch(theirs, None, None), StartFetch(mine, None, None)]
    loader.fetched(mine, (1,), PAGE, b"ranks")
    loader.packed(mine, "content")
    loader.load(LoadAdapter(mine), 6)
    assert StartFetch(mine, None, (1,)) in loader.take_actions()


def test_a_local_failure_is_not_remembered() -> None:
    loader = Core(arena_bytes=PAGE, load_seconds=10, remember_seconds=5)
    for _ in range(2):
        load(loader)
        assert loader.take_actions() == [StartFetch(key("a"), None, None)]
        loader.failed(key("a"), BROKEN, 0)


def test_loads_of_one_key_share_a_fetch_and_get_a_lease_each() -> None:
    loader = core()
    load(loader)
    load(loader)
    fetched(loader)
    load(loader)
    assert len(loader.take_actions()) == 2
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [staged("a", 0)] * 3
    assert [release(loader, "a", 0) for _ in range(4)] == [True, True, True, False]


def test_a_staged_adapter_is_leased_again_when_its_source_has_not_changed() -> None:
    loader = core()
    page = stage(loader, "a", identity=(7,))
    release(loader, "a", page)
    load(loader)
    assert loader.take_actions() == [StartFetch(key("a"), None, (7,))]
    loader.unchanged(key("a"))
    assert loader.take_outbox() == [staged("a", page, identity=(7,))]
    assert release(loader, "a", page)
    assert not release(loader, "a", page)


def test_a_staged_adapter_is_not_evicted_while_its_source_is_asked() -> None:
    loader = core(pages=2)
    release(loader, "a", stage(loader, "a", pages=2))
    load(loader, "a")
    load(loader, "b")
    fetched(loader, "b", pages=2)
    assert [type(action) for action in loader.take_actions()] == [StartFetch, StartFetch]
    loader.unchanged(key("a"))
    assert loader.take_outbox() == [staged("a", 0, pages=2)]
    release(loader, "a", 0)
    assert loader.take_actions() == [StartPack(key("b"), 0, 2 * PAGE)]


def test_changed_content_is_staged_beside_the_old_which_stays_until_its_leases_are_back() -> None:
    loader = core()
    stage(loader, "a", identity=(1,))
    assert stage(loader, "a", identity=(2,)) == 1
    assert loader.used_bytes == 2 * PAGE
    assert release(loader, "a", 0)
    assert loader.used_bytes == PAGE
    assert not release(loader, "a", 0)
    load(loader)
    assert loader.take_actions() == [StartFetch(key("a"), None, (2,))]


def test_changed_content_takes_the_room_of_the_old_when_nobody_leases_that() -> None:
    loader = core(pages=2)
    release(loader, "a", stage(loader, "a", pages=2))
    assert stage(loader, "a", pages=2, identity=(2,)) == 0
    assert (loader.staged, loader.used_bytes) == (1, 2 * PAGE)


def test_the_least_recently_used_unleased_adapter_makes_room() -> None:
    loader = core(pages=2)
    for name in ("a", "b"):
        release(loader, name, stage(loader, name))
    load(loader, "a")
    loader.unchanged(key("a"))
    loader.take_outbox()
    release(loader, "a", 0)
    assert stage(loader, "c") == 1
    load(loader, "b")
    assert loader.take_actions() == [StartFetch(key("b"), None, None)]


def test_a_load_waits_for_room_while_all_is_leased() -> None:
    loader = core(pages=2)
    for name in ("a", "b"):
        stage(loader, name)
    load(loader, "c")
    fetched(loader, "c")
    assert [type(action) for action in loader.take_actions()] == [StartFetch]
    release(loader, "b", 1)
    assert loader.take_actions() == [StartPack(key("c"), PAGE, PAGE)]


def test_what_fits_passes_what_does_not() -> None:
    loader = core(pages=3)
    stage(loader, "a", pages=2)
    for name, pages in (("large", 2), ("small", 1)):
        load(loader, name)
        fetched(loader, name, pages)
    packs = [action for action in loader.take_actions() if isinstance(action, StartPack)]
    assert packs == [StartPack(key("small"), 2 * PAGE, PAGE)]


def test_an_adapter_larger_than_the_arena_fails_and_is_closed() -> None:
    loader = core(pages=2)
    load(loader)
    fetched(loader, pages=3)
    assert loader.take_actions()[1:] == [Discard(key("a"))]
    (failure,) = failures(loader)
    assert (failure.status, failure.kind) == (422, FailureKind.ADAPTER_INVALID)
    assert "12288 bytes" in failure.message
    assert "arena" in failure.message


def test_a_failed_fetch_fails_all_its_loads_and_no_other() -> None:
    loader = core()
    for name in ("a", "b", "a"):
        load(loader, name)
    loader.failed(key("a"), BROKEN, 0)
    assert failures(loader) == [BROKEN, BROKEN]
    fetched(loader, "b")
    loader.packed(key("b"), "b (1,)")
    assert loader.take_outbox() == [staged("b", 0)]


def test_a_failed_pack_gives_its_room_to_what_waits() -> None:
    loader = core(pages=1)
    for name in ("a", "b"):
        load(loader, name)
        fetched(loader, name)
    loader.take_actions()
    loader.failed(key("a"), BROKEN, 0)
    assert loader.take_actions() == [StartPack(key("b"), 0, PAGE)]


def test_a_failed_check_leaves_what_is_staged() -> None:
    loader = core()
    stage(loader, "a")
    load(loader)
    loader.failed(key("a"), BROKEN, 0)
    assert failures(loader) == [BROKEN]
    assert release(loader, "a", 0)
    assert loader.staged == 1


def test_a_load_after_a_failure_is_fetched_anew() -> None:
    loader = core()
    load(loader)
    loader.failed(key("a"), BROKEN, 0)
    loader.take_actions()
    load(loader)
    assert loader.take_actions() == [StartFetch(key("a"), None, None)]


def test_a_load_that_takes_too_long_fails_and_its_fetch_serves_later_ones() -> None:
    loader = core(load_seconds=10)
    load(loader, now=0)
    load(loader, now=4)
    assert loader.next_deadline() == 10
    loader.expire(9.9)
    assert loader.take_outbox() == []
    loader.expire(10)
    (failure,) = failures(loader)
    assert (failure.status, failure.kind) == (503, FailureKind.ADAPTER_UNAVAILABLE)
    assert "within 10 seconds" in failure.message
    assert loader.next_deadline() == 14
    loader.expire(14)
    assert len(failures(loader)) == 1
    assert loader.next_deadline() is None

    load(loader, now=20)
    fetched(loader)
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [staged("a", 0)]


def test_what_nobody_waits_for_any_more_is_closed_when_it_has_been_fetched() -> None:
    loader = core()
    load(loader)
    loader.expire(99)
    loader.take_actions()
    fetched(loader)
    assert loader.take_actions() == [Discard(key("a"))]
    assert loader.used_bytes == 0


def test_what_nobody_waits_for_any_more_stays_when_it_has_been_packed() -> None:
    loader = core()
    load(loader)
    fetched(loader)
    loader.expire(99)
    assert len(failures(loader)) == 1
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == []
    assert loader.staged == 1


def test_a_load_that_finds_no_room_in_time_fails_and_is_closed() -> None:
    loader = core(pages=1)
    stage(loader, "a")
    load(loader, "b", now=5)
    fetched(loader, "b")
    loader.take_actions()
    loader.expire(15)
    (failure,) = failures(loader)
    assert (failure.status, failure.kind) == (503, FailureKind.ADAPTER_UNAVAILABLE)
    assert "no room" in failure.message
    assert loader.take_actions() == [Discard(key("b"))]
    release(loader, "a", 0)
    assert loader.take_actions() == []


def test_only_a_lease_that_was_given_can_come_back() -> None:
    loader = core()
    stage(loader, "a")
    assert not release(loader, "a", 1)
    assert not release(loader, "b", 0)
    assert release(loader, "a", 0)
    assert not release(loader, "a", 0)


def test_keys_differ_by_source_revision_and_scope() -> None:
    loader = core()
    keys = [
        AdapterKey("local", "a"),
        AdapterKey("hub", "a"),
        AdapterKey("local", "a", revision="other"),
        AdapterKey("local", "a", scope="other"),
    ]
    for each in keys:
        loader.load(LoadAdapter(each), 0)
    assert [action.key for action in loader.take_actions()] == keys


def test_an_adapter_that_nobody_leases_is_forgotten_at_once() -> None:
    loader = core()
    release(loader, "a", stage(loader, "a"))
    forget(loader)
    assert loader.take_outbox() == [AdapterDropped(key("a"))]
    assert (loader.staged, loader.used_bytes, loader.evictions) == (0, 0, 0)
    load(loader)
    assert loader.take_actions() == [StartFetch(key("a"), None, None)]


def test_what_the_arena_never_held_is_forgotten_as_well() -> None:
    loader = core()
    forget(loader)
    assert loader.take_outbox() == [AdapterDropped(key("a"))]


def test_an_adapter_is_forgotten_when_its_last_lease_has_come_back_outdated_ones_too() -> None:
    loader = core()
    stage(loader, "a", identity=(1,))
    stage(loader, "a", identity=(2,))
    forget(loader)
    release(loader, "a", 1)
    assert loader.take_outbox() == []
    release(loader, "a", 0)
    assert loader.take_outbox() == [AdapterDropped(key("a"))]
    assert loader.used_bytes == 0


def test_what_is_packed_for_nobody_is_not_kept_when_it_is_to_be_forgotten() -> None:
    loader = core()
    load(loader)
    fetched(loader)
    loader.expire(99)
    forget(loader)
    assert failures(loader) != []
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [AdapterDropped(key("a"))]
    assert (loader.staged, loader.used_bytes) == (0, 0)


def test_a_load_that_is_under_way_is_answered_before_its_adapter_is_forgotten() -> None:
    loader = core()
    load(loader)
    fetched(loader)
    forget(loader)
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [staged("a", 0)]
    release(loader, "a", 0)
    assert loader.take_outbox() == [AdapterDropped(key("a"))]


def test_forgetting_an_adapter_gives_its_room_to_what_waits() -> None:
    loader = core(pages=2)
    stage(loader, "a", pages=2)
    load(loader, "b")
    fetched(loader, "b", pages=2)
    loader.take_actions()
    forget(loader)
    release(loader, "a", 0)
    assert loader.take_actions() == [StartPack(key("b"), 0, 2 * PAGE)]


def test_a_failure_is_forgotten_with_its_adapter() -> None:
    loader = Core(arena_bytes=PAGE, load_seconds=10, remember_seconds=5)
    remote = AdapterKey("http", "https://h/x")
    loader.load(LoadAdapter(remote), 0)
    loader.failed(remote, BROKEN, 0)
    loader.take_actions()
    loader.forget(ForgetAdapter(remote))
    loader.load(LoadAdapter(remote), 1)
    assert loader.take_actions() == [StartFetch(remote, None, None)]


def test_what_has_to_go_for_others_is_told_and_counted() -> None:
    loader = core(pages=1)
    release(loader, "a", stage(loader, "a"))
    load(loader, "b")
    fetched(loader, "b")
    assert loader.take_outbox() == [AdapterDropped(key("a"))]
    assert loader.evictions == 1


NAMES = "abcde"
seldom = st.integers(0, 7).map(lambda number: number == 7)
SIZES = {name: index + 1 for index, name in enumerate(NAMES)}  # pages


class AnyOrder(RuleBasedStateMachine):
    """Any order of events: each load has one answer, and all leases and bytes come back."""

    def __init__(self) -> None:
        super().__init__()
        self.core = core(pages=8, load_seconds=5)
        self.now = 0.0
        self.loads = dict.fromkeys(NAMES, 0)
        self.answers = dict.fromkeys(NAMES, 0)
        self.fetching: dict[str, Identity | None] = {}
        self.open: set[str] = set()
        self.packing: dict[str, StartPack] = {}
        self.leases: list[AdapterStaged] = []
        self.version = dict.fromkeys(NAMES, 0)
        self.forgetting: set[str] = set()

    def settle(self) -> None:
        for action in self.core.take_actions():
            name = action.key.id
            match action:
                case StartFetch():
                    assert name not in self.fetching
                    self.fetching[name] = action.known
                case StartPack():
                    self.open.remove(name)
                    self.packing[name] = action
                case Discard():
                    self.open.remove(name)
        for answer in self.core.take_outbox():
            name = answer.adapter.id
            if isinstance(answer, AdapterDropped):
                assert name not in [lease.adapter.id for lease in self.leases]
                assert name not in self.packing or name not in self.forgetting
                self.forgetting.discard(name)
                continue
            self.answers[name] += 1
            if isinstance(answer, AdapterStaged):
                self.leases.append(answer)

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        load(self.core, name, self.now)
        self.loads[name] += 1
        self.settle()

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), fails=seldom)
    def fetch_ends(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.fetching)))
        known = self.fetching.pop(name)
        identity = (self.version[name],)
        if fails:
            self.core.failed(key(name), BROKEN, 0)
        elif identity == known:
            self.core.unchanged(key(name))
        else:
            self.open.add(name)
            fetched(self.core, name, SIZES[name], identity)
        self.settle()

    @precondition(lambda self: self.packing)
    @rule(data=st.data(), fails=seldom)
    def pack_ends(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.packing)))
        del self.packing[name]
        if fails:
            self.core.failed(key(name), BROKEN, 0)
        else:
            self.core.packed(key(name), "content")
        self.settle()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert self.core.release(ReleaseAdapter(lease.adapter, lease.arena_offset))
        self.settle()

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        self.forgetting.add(name)
        forget(self.core, name)
        self.settle()

    @rule(name=st.sampled_from(NAMES))
    def change_source(self, name: str) -> None:
        self.version[name] += 1

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core.expire(self.now)
        self.settle()

    @invariant()
    def what_is_leased_or_written_does_not_overlap(self) -> None:
        extents = {(lease.arena_offset, lease.nbytes) for lease in self.leases}
        extents |= {(pack.offset, pack.nbytes) for pack in self.packing.values()}
        end = 0
        for offset, nbytes in sorted(extents):
            assert offset >= end
            end = offset + nbytes
        assert end <= 8 * PAGE

    @invariant()
    def no_load_has_two_answers(self) -> None:
        assert all(self.answers[name] <= self.loads[name] for name in NAMES)

    def teardown(self) -> None:
        """Let everything end: then all is answered, closed and idle."""
        self.wait(100)
        assert self.answers == self.loads
        for name in list(self.fetching):
            self.open.add(name)
            del self.fetching[name]
            fetched(self.core, name, SIZES[name], (-1,))
            self.settle()
        for name in list(self.packing):
            del self.packing[name]
            self.core.packed(key(name), "content")
            self.settle()
        for lease in self.leases:
            assert self.core.release(ReleaseAdapter(lease.adapter, lease.arena_offset))
        self.leases = []
        self.settle()
        assert not self.forgetting
        assert not self.open
        assert self.answers == self.loads
        load(self.core, "all", self.now)
        self.core.take_actions()
        fetched(self.core, "all", pages=8)
        assert self.core.take_actions() == [StartPack(key("all"), 0, 8 * PAGE)]


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# --- after a death --------------------------------------------------------------------------------


def test_what_a_predecessor_has_leased_is_not_given_to_others() -> None:
    loader = core(pages=3)
    loader.leased(Leased((Lease(key("a"), PAGE, PAGE),)))
    assert stage(loader, "b") == 0
    load(loader, "c")
    fetched(loader, "c", pages=2)
    assert loader.take_actions() == [StartFetch(key("c"), None, None)]  # there is no room
    assert release(loader, "a", 1)
    assert loader.take_outbox() == [AdapterDropped(key("a"))]
    assert loader.take_actions() == [StartPack(key("c"), PAGE, 2 * PAGE)]


def test_what_a_predecessor_has_leased_answers_no_load() -> None:
    loader = core()
    loader.leased(Leased((Lease(key("a"), 0, PAGE),)))
    assert stage(loader, "a") == 1
    assert release(loader, "a", 0)
    assert loader.take_outbox() == []  # the newer one is there
    assert release(loader, "a", 1)


def test_another_scheduler_has_leased_nothing_and_finds_what_is_staged() -> None:
    loader = core(pages=2)
    stage(loader, "a")
    stage(loader, "b")
    loader.start_over()
    assert not release(loader, "a", 0)
    load(loader, "b")
    assert loader.take_actions() == [StartFetch(key("b"), None, (1,))]
    loader.unchanged(key("b"))
    assert loader.take_outbox() == [staged("b", 1)]
    assert stage(loader, "c") == 0  # in place of what nobody leases


def test_another_scheduler_gets_no_answer_that_it_has_not_asked_for() -> None:
    loader = core(pages=1)
    stage(loader, "taken")
    for name in ("fetching", "waiting", "failing"):
        load(loader, name)
    fetched(loader, "waiting")
    forget(loader, "taken")
    loader.take_actions()
    loader.start_over()
    assert loader.take_actions() == [Discard(key("waiting"))]
    fetched(loader, "fetching")
    loader.failed(key("failing"), BROKEN, 1)
    loader.expire(1000)
    assert loader.take_actions() == [Discard(key("fetching"))]
    assert loader.take_outbox() == []
    assert loader.next_deadline() is None


def test_a_fetch_under_way_serves_another_scheduler() -> None:
    loader = core()
    load(loader)
    loader.take_actions()
    loader.start_over()
    load(loader)
    assert loader.take_actions() == []
    fetched(loader)
    loader.packed(key("a"), "a (1,)")
    assert loader.take_outbox() == [staged("a", 0)]
