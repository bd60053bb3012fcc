"""Stop strings are found across pieces, and nothing that may be part of one is shown."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer_workers.stop_strings import StopStrings


def shown(pieces: Iterable[str], stop: list[str], keep: bool = False) -> tuple[list[str], bool]:
    """What can be shown after each piece, then at the end; and whether a stop string matched."""
    strings = StopStrings(stop, keep)
    texts = []
    for piece in pieces:
        texts.append(strings.push(piece))
        if strings.matched:
            return texts, True
    return [*texts, strings.finish()], False


def naive(text: str, stop: list[str], keep: bool) -> tuple[str, bool]:
    """The same by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end if keep else end - max(map(len, found))], True
    return text, False


few_letters = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=4)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=7) | st.text(alphabet="abc", max_size=3)),
    stop=stops,
    keep=st.booleans(),
)
def test_any_cut_into_pieces_gives_what_a_search_of_the_whole_text_gives(
    pieces: list[str], stop: list[str], keep: bool
) -> None:
    texts, matched = shown(pieces, stop, keep)
    assert ("".join(texts), matched) == naive("".join(pieces), stop, keep)


@given(text=few_letters, stop=stops)
def test_what_is_held_back_is_never_more_than_a_stop_string_could_need(
    text: str, stop: list[str]
) -> None:
    strings = StopStrings(stop, keep=False)
    shown_text = ""
    for index, character in enumerate(text, start=1):
        shown_text += strings.push(character)
        if strings.matched:
            return
        held = text[len(shown_text) : index]
        assert not held or any(string.startswith(held) for string in stop)


def test_a_stop_string_is_found_across_pieces_and_cut_off() -> None:
    assert shown(["Hello #", "#", "# User"], ["###"]) == (["Hello ", "", ""], True)


def test_a_beginning_that_comes_to_nothing_is_shown_later() -> None:
    assert shown(["a#", "#", "b"], ["###"]) == (["a", "", "##b", ""], False)


def test_a_beginning_at_the_end_of_the_text_is_shown_at_the_end() -> None:
    assert shown(["a##"], ["###"]) == (["a", "##"], False)


def test_a_kept_stop_string_stays_and_what_follows_it_goes() -> None:
    assert shown(["one.two"], ["."], keep=True) == (["one."], True)


@pytest.mark.parametrize("stop", [["abcd", "bc"], ["bc", "abcd"]])
def test_the_match_that_ends_first_wins(stop: list[str]) -> None:
    assert shown(["xabcd"], stop) == (["xa"], True)


@pytest.mark.parametrize("stop", [["abc", "bc"], ["bc", "abc"]])
def test_of_matches_that_end_together_the_longest_wins(stop: list[str]) -> None:
    assert shown(["xabc"], stop) == (["x"], True)


def test_a_very_long_stop_string_costs_one_pass() -> None:
    stop = "a" * 200_000 + "b"
    strings = StopStrings([stop], keep=False)
    assert [strings.push("a" * 1000) for _ in range(300)][-1] == "a" * 1000
    assert strings.finish() == "a" * 200_000
