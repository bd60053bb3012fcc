"""A queue in which everybody has a turn."""

from hypothesis import given
from hypothesis import strategies as st

from tokenizer_workers.turns import Turns


def test_who_has_put_much_there_waits_for_the_others_between() -> None:
    turns: Turns[int] = Turns()
    for number in range(4):
        turns.put("busy", "a", number)
    turns.put("other", "a", 10)
    assert [turns.take(), turns.take()] == [0, 10]
    turns.put("other", "b", 11)
    assert [turns.take() for _ in range(4)] == [1, 11, 2, 3]
    assert not turns


def test_of_one_tenant_the_kinds_take_turns_and_more_of_them_are_no_more_turns() -> None:
    turns: Turns[str] = Turns()
    for kind in "aaabc":
        turns.put("", kind, kind)
    turns.put("other", "a", "other")
    assert [turns.take() for _ in range(6)] == ["a", "other", "b", "c", "a", "a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.booleans())))
def test_nothing_is_lost_and_the_order_of_each_kind_stays(
    steps: list[tuple[str, str, bool]],
) -> None:
    turns: Turns[tuple[str, str, int]] = Turns()
    put: list[tuple[str, str, int]] = []
    taken: list[tuple[str, str, int]] = []
    for number, (tenant, kind, takes) in enumerate(steps):
        put.append((tenant, kind, number))
        turns.put(tenant, kind, put[-1])
        if takes:
            taken.append(turns.take())
    while turns:
        taken.append(turns.take())
    assert sorted(taken) == sorted(put)
    for of in {one[:2] for one in put}:
        assert [one for one in taken if one[:2] == of] == [one for one in put if one[:2] == of]
