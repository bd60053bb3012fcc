"""Names that administrators gave, and when a frontend says that it has taken them."""

from hypothesis import given
from hypothesis import strategies as st

from frontend import aliases
from pipeline.messages import (
    MERGED,
    AdapterKey,
    Aliases,
    Merge,
    MergePart,
    MergeStrategy,
    NamesKept,
)

A, B = AdapterKey("hub", "org/a"), AdapterKey("hub", "org/b")
PRIVATE_A = AdapterKey("hub", "org/a", scope="me")


class Known(aliases.Aliases):
    def __init__(self) -> None:
        self.versions: list[int] = []
        super().__init__(self.versions.append)

    def names(self, version: int, **names: AdapterKey) -> None:
        self.replace(Aliases(version, names))


def test_names_hold_and_are_confirmed_at_once_when_nobody_uses_them() -> None:
    known = Known()
    known.names(1, sql=A)
    assert known.find("sql") == A
    assert known.find("other") is None
    assert known.versions == [1]


def test_a_name_that_is_gone_is_confirmed_when_those_who_began_with_it_have_ended() -> None:
    known = Known()
    known.names(1, sql=A)
    known.began(7, A)
    known.began(8, PRIVATE_A)
    known.names(2)
    assert known.find("sql") is None
    known.ended(7)
    assert known.versions == [1]
    known.ended(8)
    assert known.versions == [1, 2]


def test_a_name_that_means_something_else_waits_for_what_it_meant() -> None:
    known = Known()
    known.names(1, sql=A)
    known.began(7, A)
    known.names(2, sql=B)
    assert known.find("sql") == B
    assert known.versions == [1]
    known.ended(7)
    assert known.versions == [1, 2]


def test_those_who_begin_later_or_with_others_are_not_waited_for() -> None:
    known = Known()
    known.names(1, sql=A)
    known.began(7, B)
    known.names(2)
    known.began(8, A)
    assert known.versions == [1, 2]
    known.ended(7)
    known.ended(8)
    assert known.versions == [1, 2]


def test_a_merge_uses_its_parts() -> None:
    known = Known()
    known.names(1, sql=A)
    merge = Merge((MergePart(A, 1.0), MergePart(B, 1.0)), MergeStrategy.LINEAR)
    known.began(7, AdapterKey(MERGED, "both", merge=merge))
    known.names(2)
    assert known.versions == [1]
    known.ended(7)
    assert known.versions == [1, 2]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("begin"), st.sampled_from([A, B])),
            st.tuples(st.just("end"), st.integers(0, 20)),
            st.tuples(st.just("names"), st.dictionaries(st.sampled_from("xy"), st.just(A))),
        )
    )
)
def test_versions_are_confirmed_in_order_and_all_of_them_in_the_end(events: list[object]) -> None:
    known = Known()
    begun = version = 0
    in_flight: set[int] = set()
    for event in events:
        match event:
            case "begin", AdapterKey() as key:
                begun += 1
                in_flight.add(begun)
                known.began(begun, key)
            case "end", int(request_id):
                in_flight.discard(request_id)
                known.ended(request_id)
            case "names", dict(names):
                version += 1
                known.names(version, **names)
        assert known.versions == list(range(1, len(known.versions) + 1))
    for request_id in in_flight:
        known.ended(request_id)
    assert known.versions == list(range(1, version + 1))


def test_another_scheduler_is_told_the_names_and_nothing_of_versions() -> None:
    known = Known()
    assert known.scheduler_started() is None
    known.names(4, sql=A)
    known.began(7, A)
    known.names(5)
    known.names(6, other=B)
    assert known.scheduler_started() == NamesKept(6, {"other": B}, 0)
    known.ended(7)
    assert known.versions == [4]  # its predecessor's are nothing to it
