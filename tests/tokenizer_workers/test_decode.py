"""The pieces of a text, joined, are what the tokenizer decodes from all ids at once."""

from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.tokenizer_workers.tokenizers_for_tests import (
    sentencepiece_like,
    with_added_tokens,
    word_pieces,
)
from tokenizer_workers.decode import ByteFallbackDecoder, ByteLevelDecoder, PrefixDecoder
from tokenizer_workers.loading import TextModel, decoders

SENTENCEPIECE = sentencepiece_like()
VOCABULARY = SENTENCEPIECE.get_vocab_size()
FIRST_BYTE = 3  # the id of <0x00>
texts = st.text() | st.text(alphabet="abc é日本👩‍🚀🇫🇷\n ▁�\ufeff")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def pieces(decoder_of: Callable[[], object], ids: Iterable[int]) -> list[str]:
    """What a fresh decoder gives for each token, and at last what it held back."""
    decoder = decoder_of()
    assert isinstance(decoder, ByteLevelDecoder | ByteFallbackDecoder | PrefixDecoder)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


@given(text=texts)
def test_byte_level_text_comes_back_whole(
    model: TextModel, tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text).ids
    assert "".join(pieces(model.new_decoder, ids)) == decode(tokenizer, ids)


@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300)))
def test_any_ids_of_a_byte_level_vocabulary_decode_as_the_tokenizer_does(
    model: TextModel, tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(pieces(model.new_decoder, ids)) == decode(tokenizer, ids)


@given(text=texts)
def test_sentencepiece_text_comes_back_whole(text: str) -> None:
    ids = SENTENCEPIECE.encode(text).ids
    new_decoder = decoders(SENTENCEPIECE, VOCABULARY, special_ids(SENTENCEPIECE)).new
    assert "".join(pieces(new_decoder, ids)) == decode(SENTENCEPIECE, ids)


def byte_tokens(data: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in data]


ordinary = st.lists(
    st.integers(0, 2) | st.integers(FIRST_BYTE + 256, VOCABULARY - 1), min_size=1, max_size=5
)
whole_runs = st.text(min_size=1, max_size=4).map(lambda text: byte_tokens(text.encode()))
broken_runs = st.characters(min_codepoint=128, exclude_categories=["Cs"]).map(
    lambda character: byte_tokens(character.encode()[:-1])
)
shown = st.integers(FIRST_BYTE + 256, VOCABULARY - 1)


@given(
    runs=st.lists(st.tuples(ordinary | whole_runs | broken_runs, shown)),
    last=whole_runs | broken_runs | st.just([]),
    strip=st.integers(0, 3),
)
def test_any_ids_of_a_sentencepiece_vocabulary_decode_as_the_tokenizer_does(
    runs: list[tuple[list[int], int]], last: list[int], strip: int
) -> None:
    tokenizer = sentencepiece_like(strip)
    ids = [token_id for run, end in runs for token_id in (*run, end)] + last
    new_decoder = decoders(tokenizer, VOCABULARY, special_ids(tokenizer)).new
    assert "".join(pieces(new_decoder, ids)) == decode(tokenizer, ids)


def test_a_broken_run_of_byte_tokens_keeps_its_whole_characters() -> None:
    """The tokenizer gives up such a run; here its beginning may have been sent already."""
    new_decoder = decoders(SENTENCEPIECE, VOCABULARY, ()).new
    assert pieces(new_decoder, byte_tokens(b"\n\xc3!\xe6\x97")) == ["\n", "", "�!", "", "", "��"]


def test_a_character_of_several_tokens_comes_with_its_last_one(
    model: TextModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("🦙").ids
    assert len(ids) > 1
    assert pieces(model.new_decoder, ids) == [""] * (len(ids) - 1) + ["🦙", ""]


def test_half_a_character_at_the_end_is_replaced(model: TextModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙").ids[:-1]
    assert pieces(model.new_decoder, ids)[-1] == "�"


def test_a_new_line_of_byte_tokens_is_not_held_back() -> None:
    new_decoder = decoders(SENTENCEPIECE, VOCABULARY, ()).new
    assert pieces(new_decoder, byte_tokens(b"\n")) == ["\n", ""]


@pytest.mark.parametrize("make", [sentencepiece_like, word_pieces])
@given(data=st.data())
def test_added_tokens_decode_as_the_tokenizer_does(
    make: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    tokenizer = with_added_tokens(make())
    added = st.integers(tokenizer.get_vocab_size() - 6, tokenizer.get_vocab_size() - 1)
    ids = data.draw(st.lists(added))
    new_decoder = decoders(tokenizer, tokenizer.get_vocab_size(), special_ids(tokenizer)).new
    assert "".join(pieces(new_decoder, ids)) == decode(tokenizer, ids)


@given(ids=st.lists(st.integers(0, word_pieces().get_vocab_size() - 1)))
def test_a_tokenizer_without_a_table_is_asked_again_and_again(ids: list[int]) -> None:
    tokenizer = word_pieces()
    new_decoder = decoders(tokenizer, tokenizer.get_vocab_size(), special_ids(tokenizer)).new
    assert isinstance(new_decoder(), PrefixDecoder)
    assert "".join(pieces(new_decoder, ids)) == decode(tokenizer, ids)


def test_the_fallback_holds_half_a_character_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦙b").ids

    def new_decoder() -> PrefixDecoder:
        return PrefixDecoder(lambda ids: str(tokenizer.decode(ids)), hidden=())

    given_pieces = pieces(new_decoder, ids)
    assert "".join(given_pieces) == "a🦙b"
    assert not any("�" in piece for piece in given_pieces)
    assert pieces(new_decoder, ids[:2])[-1] == "�"


def test_the_fallback_gives_up_what_never_becomes_a_character(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🦙").ids[0]
    decoder = PrefixDecoder(lambda ids: str(tokenizer.decode(ids)), hidden=())
    texts = [decoder.push(half) for _ in range(100)]
    assert sum(map(len, texts)) > 90


def test_special_tokens_are_hidden_from_the_text_and_shown_in_the_details(
    model: TextModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("Paris<|im_end|>").ids
    assert "".join(pieces(model.new_decoder, ids)) == "Paris"
    assert "".join(pieces(model.new_token_decoder, ids)) == "Paris<|im_end|>"


@pytest.mark.parametrize("make", [sentencepiece_like, word_pieces])
def test_ids_between_the_tokenizer_and_the_model_add_nothing(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    padded = tokenizer.get_vocab_size() + 100
    decoder_of = decoders(tokenizer, padded, ()).new
    assert pieces(decoder_of, [padded - 1]) == ["", ""]
