"""Log-probabilities in OpenAI's shapes."""

from typing import Any

from frontend.openai_logprobs import ChatLogprobs, CompletionLogprobs
from frontend.openai_replies import ChatShape, CompletionShape
from pipeline.messages import Alternative, TokenDetail
from tests.frontend.fakes import end, json_of, piece, streamed

HI = TokenDetail(1, "Hi", -0.5, False, (Alternative(1, "Hi", -0.5), Alternative(2, "Ho", -1.5)))
SMILE = "🙂".encode()
HALF = TokenDetail(3, "", -0.25, False, data=SMILE[:2])
OTHER_HALF = TokenDetail(4, "🙂", -0.125, False, data=SMILE[2:])
EOS = TokenDetail(9, "<end>", -2.0, True)
TOKENS = (HI, HALF, OTHER_HALF, EOS)


def chat_shape() -> ChatShape:
    return ChatShape(model="m", include_usage=False, logprobs=ChatLogprobs())


def completion_shape(top: int) -> CompletionShape:
    return CompletionShape(model="m", include_usage=False, logprobs=CompletionLogprobs(top))


def test_a_chats_tokens_have_text_bytes_and_likeliest() -> None:
    first = ChatLogprobs().of(TOKENS)["content"][0]
    assert first == {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
            {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
        ],
    }


def test_the_bytes_of_a_chats_tokens_are_those_of_its_content() -> None:
    written = ChatLogprobs().of(TOKENS)["content"]
    assert b"".join(bytes(one["bytes"]) for one in written).decode() == "Hi🙂"
    assert [one["token"] for one in written[1:]] == [r"\xf0\x9f", r"\x99\x82"]


def test_a_token_that_is_whole_is_written_as_it_is_wherever_it_stands() -> None:
    """The first of a SentencePiece text, whose space is not in the text."""
    stripped = TokenDetail(1, "Hi", -0.5, False, data=b" Hi")
    [written] = ChatLogprobs().of([stripped])["content"]
    assert (written["token"], written["bytes"]) == (" Hi", [32, 72, 105])


def test_a_completion_has_them_in_parallel_lists() -> None:
    assert CompletionLogprobs(2).of(TOKENS) == {
        "tokens": ["Hi", r"bytes:\xf0\x9f", r"bytes:\x99\x82", "<end>"],
        "token_logprobs": [-0.5, -0.25, -0.125, -2.0],
        "top_logprobs": [
            {"Hi": -0.5, "Ho": -1.5},
            {r"bytes:\xf0\x9f": -0.25},
            {r"bytes:\x99\x82": -0.125},
            {"<end>": -2.0},
        ],
        "text_offset": [0, 2, 2, 3],
    }


def test_the_likeliest_of_a_completion_hold_its_own_token_and_no_text_twice() -> None:
    others = (Alternative(5, "a", -0.1), Alternative(6, "a", -0.2))
    token = TokenDetail(7, "b", -3.0, False, others)
    assert CompletionLogprobs(2).of([token])["top_logprobs"] == [{"a": -0.1, "b": -3.0}]
    assert CompletionLogprobs(0).of([token])["top_logprobs"] is None


def test_what_has_no_probability_has_none() -> None:
    first = TokenDetail(1, "Hi", None, False)
    written = CompletionLogprobs(1).of([first])
    assert (written["token_logprobs"], written["top_logprobs"]) == ([None], [None])


def test_a_stream_brings_them_with_the_text_and_their_places_go_on() -> None:
    pieces = [piece("Hi", tokens=[HI]), piece("", tokens=[HALF]), piece("🙂", tokens=[OTHER_HALF])]
    chunks = streamed(completion_shape(0), *pieces, last=end())[:-1]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one["text_offset"] for one in logprobs[:3]] == [[0], [2], [2]]
    assert logprobs[3] is None
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_whole_reply_has_what_its_stream_has() -> None:
    pieces = [piece("Hi", tokens=[HI]), piece("🙂", tokens=[HALF, OTHER_HALF])]
    whole: list[Any] = json_of(chat_shape().whole(pieces, end()))["choices"]
    chunks = streamed(chat_shape(), *pieces, last=end())[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    joined = [one for part in parts if part is not None for one in part["content"]]
    assert whole[0]["logprobs"]["content"] == joined
    assert len(joined) == 3
