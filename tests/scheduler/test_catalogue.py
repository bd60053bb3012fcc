"""What is known of adapters, and for how long."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapter_layout import pack_ranks
from pipeline.messages import AdapterStaged, Tier
from scheduler.catalogue import Catalogue
from tests.scheduler.world import key


def staged(name: str, *ranks: int) -> AdapterStaged:
    return AdapterStaged(key(name), "content", 0, 100, pack_ranks(ranks or (8,)))


def test_an_adapter_is_known_once_it_was_staged() -> None:
    catalogue = Catalogue()
    catalogue.asked(key("a"), 1.0, resident=False)
    assert list(catalogue) == []
    catalogue.staged(staged("a", 0, 16, 8), 2.0)
    catalogue.staged(staged("a", 0, 16, 8), 3.0)
    known = catalogue.of(key("a"))
    assert (known.loads, known.nbytes, known.rank, known.last_used) == (2, 100, 16, 3.0)


def test_its_tier_is_the_best_place_that_it_lies_in() -> None:
    catalogue = Catalogue()
    assert catalogue.tier(key("a"), resident=False) == Tier.DISK
    catalogue.staged(staged("a"), 0)
    assert catalogue.tier(key("a"), resident=False) == Tier.HOST
    assert catalogue.tier(key("a"), resident=True) == Tier.DEVICE
    catalogue.dropped(key("a"))
    assert catalogue.tier(key("a"), resident=False) == Tier.DISK


def test_requests_are_counted_by_where_their_adapter_lay() -> None:
    catalogue = Catalogue()
    catalogue.asked(key("a"), 0, resident=False)
    catalogue.staged(staged("a"), 1)
    catalogue.asked(key("a"), 2, resident=True)
    catalogue.asked(key("a"), 3, resident=False)
    assert catalogue.hits == {Tier.DISK: 1, Tier.DEVICE: 1, Tier.HOST: 1}
    assert catalogue.of(key("a")).last_used == 3


names = st.sampled_from("abcdef")


@given(st.lists(st.tuples(st.sampled_from(["staged", "asked", "dropped"]), names)))
def test_those_in_the_arena_stay_known_and_of_the_others_the_latest_used(
    events: list[tuple[str, str]],
) -> None:
    catalogue = Catalogue(most=2)
    used: list[str] = []  # the latest last
    in_arena: set[str] = set()
    for now, (event, name) in enumerate(events):
        if event == "staged":
            catalogue.staged(staged(name), now)
            in_arena.add(name)
        elif event == "asked":
            catalogue.asked(key(name), now, resident=False)
        else:
            catalogue.dropped(key(name))
            in_arena.discard(name)
        if event == "staged" or (event == "asked" and name in used):
            used = [one for one in used if one != name] + [name]
        elsewhere = [one for one in used if one not in in_arena]
        used = [one for one in used if one in in_arena or one in elsewhere[-2:]]
        assert [one.id for one in catalogue] == used
