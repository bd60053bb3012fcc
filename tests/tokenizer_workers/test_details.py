"""What is told of single tokens."""

from array import array

import pytest

from pipeline.logprobs import pack
from pipeline.messages import Alternative, Logprobs
from tokenizer_workers.decode import ByteLevelDecoder
from tokenizer_workers.details import PromptTokens, Vocabulary
from tokenizer_workers.token_table import byte_level_table

ACUTE = "é".encode()
TOKENS = ["a", "b", "\u00c3", "\u00a9", "<end>"]  # Ã and © are the bytes of é
TABLE = byte_level_table(TOKENS, ())
VOCABULARY = Vocabulary(TABLE.bytes_of, frozenset({4}))


def test_a_token_has_its_own_bytes_where_its_text_does_not_say_them() -> None:
    decoder = ByteLevelDecoder(TABLE)
    details = [VOCABULARY.detail(one, decoder.push(one), None, 0) for one in (0, 2, 3, 4)]
    assert [one.text for one in details] == ["a", "", "é", "<end>"]
    assert [one.data for one in details] == [None, ACUTE[:1], ACUTE[1:], None]
    assert [one.special for one in details] == [False, False, False, True]
    joined = b"".join(one.text.encode() if one.data is None else one.data for one in details)
    assert joined == "aé<end>".encode()


def test_alternatives_have_a_text_of_their_own() -> None:
    row = pack(-0.5, [(0, -0.5), (3, -2.0), (4, -3.0)])
    detail = VOCABULARY.detail(0, "a", row, 3)
    assert detail.logprob == -0.5
    assert detail.alternatives == (
        Alternative(0, "a", -0.5),
        Alternative(3, "\ufffd", -2.0, ACUTE[1:]),
        Alternative(4, "<end>", -3.0, special=True),
    )


@pytest.mark.parametrize(
    ("token", "logprob", "likeliest", "expected"),
    [
        (0, -1.0, [(1, -1.0)], [0]),
        (0, -1.0, [(1, -1.0), (0, -1.0)], [0, 1]),
        (0, -1.0, [(2, -0.5), (1, -1.0), (3, -1.0)], [2, 0, 1]),
        (0, -3.0, [(1, -1.0), (2, -2.0)], [1, 2]),
        (0, -1.0, [], []),
    ],
)
def test_the_token_itself_comes_before_those_that_are_as_likely(
    token: int, logprob: float, likeliest: list[tuple[int, float]], expected: list[int]
) -> None:
    detail = VOCABULARY.detail(token, "a", pack(logprob, likeliest), len(likeliest))
    assert [one.id for one in detail.alternatives] == expected


def prompt_of(*token_ids: int) -> PromptTokens:
    ids = array("i", token_ids).tobytes()
    return PromptTokens(ids, Logprobs(prompt_top=1), VOCABULARY, ByteLevelDecoder(TABLE))


def test_a_prompt_is_complete_when_all_but_its_first_token_have_come() -> None:
    prompt = prompt_of(0, 2, 3)
    assert not prompt.complete
    prompt.add([pack(-1.0, [(1, -0.25)])])
    prompt.add([pack(-2.0, [(3, -2.0)])])
    assert prompt.complete
    first, second, third = prompt.details
    assert (first.text, first.logprob, first.alternatives) == ("a", None, ())
    assert (second.logprob, second.alternatives) == (-1.0, (Alternative(1, "b", -0.25),))
    assert (third.text, third.logprob) == ("é", -2.0)


def test_a_prompt_of_one_token_waits_for_nothing() -> None:
    assert prompt_of(1).complete
