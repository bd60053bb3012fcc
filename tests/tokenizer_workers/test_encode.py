"""Prompts become token ids, or a sentence that says why not."""

from array import array
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from pipeline.errors import RequestError
from pipeline.messages import FailureKind, Prompt, Sampling, Tokenize
from tests.tokenizer_workers.tokenizers_for_tests import sentencepiece_like
from tokenizer_workers.chat_template import ChatTemplate
from tokenizer_workers.encode import Encoder
from tokenizer_workers.loading import TextModel

BOS = 1
CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def tokenizer_with_bos() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encoder(chat: str | None = CHAT, max_total_tokens: int = 20, **given: Any) -> Encoder:
    tokenizer = tokenizer_with_bos()
    return Encoder(
        tokenizer=tokenizer,
        chat_template=None if chat is None else ChatTemplate(chat, {}),
        max_total_tokens=max_total_tokens,
        **{"vocabulary": tokenizer.get_vocab_size(), "token_characters": 6, **given},
    )


def prompt(**given: Any) -> Prompt:
    return Prompt(request_id=1, arrived=0.0, **given)


def ids_of(encoder: Encoder, **given: Any) -> list[int]:
    encoded = encoder.encode(prompt(**given))
    ids = array("i", encoded.token_ids).tolist()
    assert encoded.prompt_tokens == len(ids)
    return ids


def refusal(encoder: Encoder, **given: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        encoder.encode(prompt(**given))
    assert caught.value.status == 400
    return caught.value


def test_text_gets_the_special_tokens_that_its_tokenizer_adds() -> None:
    ids = tokenizer_with_bos().encode("the cat").ids
    assert ids[0] == BOS
    assert ids_of(encoder(), text="the cat") == ids
    assert ids_of(encoder(), text="the cat", add_special_tokens=False) == ids[1:]


def test_a_chat_gets_only_the_special_tokens_of_its_template() -> None:
    ids = ids_of(encoder(), chat=[{"role": "user", "content": "cat"}])
    assert ids.count(BOS) == 1
    assert ids == tokenizer_with_bos().encode("<s>cat</s>", add_special_tokens=False).ids


def test_token_ids_are_taken_as_they_are() -> None:
    assert ids_of(encoder(), token_ids=array("i", [5, 3, 4]).tobytes()) == [5, 3, 4]


@pytest.mark.parametrize("given", [{"text": "", "add_special_tokens": False}, {"token_ids": b""}])
def test_a_prompt_without_tokens_is_refused(given: dict[str, Any]) -> None:
    error = refusal(encoder(), **given)
    assert error.kind == FailureKind.VALIDATION
    assert error.message == "the prompt is empty: it has no tokens"


@pytest.mark.parametrize("wrong", [-1, 300, 2**31 - 1])
def test_a_token_id_outside_the_vocabulary_is_refused_by_its_number(wrong: int) -> None:
    error = refusal(encoder(vocabulary=300), token_ids=array("i", [4, wrong, 5]).tobytes())
    assert error.message == f"token id {wrong} is not in the vocabulary of 300"


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_its_length() -> None:
    ids = array("i", [4] * 20).tobytes()
    error = refusal(encoder(), token_ids=ids)
    assert error.message == "`inputs` must have less than 20 tokens. Given: 20"
    assert len(ids_of(encoder(), token_ids=ids[4:])) == 19


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    error = refusal(encoder(), text="a" * 121)
    assert error.message == (
        "`inputs` must have less than 20 tokens. Given: 121 characters, which cannot be so few"
    )


def test_the_longest_text_that_can_fit_is_encoded() -> None:
    error = refusal(encoder(), text="a" * 120)
    assert error.message.startswith("`inputs` must have less than 20 tokens. Given: 12")


def test_a_reply_takes_what_the_prompt_leaves_when_nothing_is_asked() -> None:
    encoded = encoder().encode(prompt(token_ids=array("i", [4] * 7).tobytes()))
    assert encoded.max_tokens == 13


def test_prompt_and_reply_may_fill_the_context_to_the_last_token() -> None:
    ids = array("i", [4] * 7).tobytes()
    assert encoder().encode(prompt(token_ids=ids, max_tokens=13)).max_tokens == 13
    error = refusal(encoder(), token_ids=ids, max_tokens=14)
    assert error.message == (
        "`inputs` tokens + `max_new_tokens` must be <= 20. "
        "Given: 7 `inputs` tokens and 14 `max_new_tokens`"
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_end_of_a_text_is_kept_with_what_the_tokenizer_puts_before_it(count: int) -> None:
    """However long the text is: it may be one that could not be a prompt."""
    for text in ("the cat sat", "the cat sat " * 40):
        ids = tokenizer_with_bos().encode(text).ids
        assert ids_of(encoder(), text=text, truncate=count) == [BOS, *ids[1 - count :]]
        plain = ids_of(encoder(), text=text, truncate=count, add_special_tokens=False)
        assert plain == ids[-count:]


def test_the_end_of_a_text_is_its_last_token_where_there_is_room_for_one() -> None:
    assert ids_of(encoder(), text="a cat", truncate=1) == ids_of(encoder(), text="a cat")[-1:]


def test_a_prompt_that_is_shorter_is_kept_whole() -> None:
    assert ids_of(encoder(), text="the cat", truncate=19) == ids_of(encoder(), text="the cat")


def test_the_end_of_chats_and_of_token_ids_is_kept_too() -> None:
    chat = [{"role": "user", "content": "cat"}]
    assert ids_of(encoder(), chat=chat, truncate=2) == ids_of(encoder(), chat=chat)[-2:]
    ids = array("i", range(5, 55)).tobytes()
    assert ids_of(encoder(), token_ids=ids, truncate=3) == [52, 53, 54]


@pytest.mark.parametrize("wrong", [0, 20, 1 << 31])
def test_no_more_can_be_kept_than_a_prompt_can_have(wrong: int) -> None:
    assert refusal(encoder(), text="cat", truncate=wrong).message == (
        f"`truncate` must be strictly positive and less than 19. Given: {wrong}"
    )


def test_the_tokens_of_a_text_are_told_with_their_places_in_characters() -> None:
    answer = encoder().tokenized(Tokenize(7, 0, "aé cat"))
    assert (answer.question_id, answer.failure) == (7, None)
    encoding = tokenizer_with_bos().encode("aé cat")
    assert array("i", answer.token_ids).tolist() == encoding.ids
    assert answer.texts == tuple(encoding.tokens)
    spans = array("i", answer.spans).tolist()
    assert list(zip(spans[::2], spans[1::2], strict=True)) == encoding.offsets
    assert spans[-1] == 6
    without = encoder().tokenized(Tokenize(7, 0, "aé cat", add_special_tokens=False))
    assert without.texts == answer.texts[1:]
    assert encoder().tokenized(Tokenize(8, 0, "", add_special_tokens=False)).token_ids == b""


def test_the_tokens_of_a_text_that_is_no_prompt_are_not_told() -> None:
    failure = encoder().tokenized(Tokenize(7, 0, "a" * 121)).failure
    assert failure is not None
    assert failure.kind == FailureKind.VALIDATION
    assert "Given: 121 characters" in failure.message


def test_an_empty_stop_string_is_refused() -> None:
    assert refusal(encoder(), text="cat", stop=("a", "")).message == (
        "`stop` strings cannot be empty"
    )


@pytest.mark.parametrize("wrong", [-1, 1 << 20])
def test_parameters_name_tokens_of_the_vocabulary_or_are_refused(wrong: int) -> None:
    biased = Sampling(logit_bias=((3, 1.0), (wrong, 1.0)))
    error = refusal(encoder(), text="the cat", sampling=biased)
    assert f"`logit_bias` names token id {wrong}" in error.message
    error = refusal(encoder(), text="the cat", stop_token_ids=(3, wrong))
    assert f"`stop_token_ids` names token id {wrong}" in error.message
    assert ids_of(encoder(), text="the cat", sampling=Sampling(logit_bias=((3, 1.0),)))


def test_a_chat_without_a_template_is_refused() -> None:
    error = refusal(encoder(chat=None), chat=[{"role": "user", "content": "cat"}])
    assert (error.kind, error.message) == (
        FailureKind.TEMPLATE,
        "the model has no chat template",
    )


def test_a_chat_with_the_default_model_starts_the_assistants_turn(
    model: TextModel, tokenizer: Tokenizer
) -> None:
    encoded = model.encoder.encode(prompt(chat=[{"role": "user", "content": "Hi"}]))
    text = tokenizer.decode(array("i", encoded.token_ids).tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.max_tokens == 8192 - encoded.prompt_tokens
