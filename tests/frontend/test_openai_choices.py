"""Several choices of OpenAI's routes: their order, their best, their usage, their streams."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from pipeline.choices import request_ids, seed_of
from pipeline.messages import (
    FailureKind,
    FinishReason,
    Pieces,
    Prompt,
    TokenDetail,
)
from tests.frontend.fakes import Backend, Connection, end, events, fails, failure, piece, says

pytestmark = pytest.mark.anyio

CHAT = {"model": "", "messages": [{"role": "user", "content": "Hi"}]}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "", "prompt": "Hi", **changes}


def by_choice(prompt: Prompt) -> list[Pieces]:
    """Each choice says its number, and ends for a reason of its own; the last ones come first."""
    ids = request_ids(prompt.request_id, prompt.choices)
    told = []
    for choice, request_id in reversed(list(enumerate(ids))):
        tokens = [TokenDetail(choice, str(choice), -float((choice * 2) % 5), False)]
        tokens *= prompt.token_details
        reason = FinishReason.LENGTH if choice % 2 else FinishReason.EOS
        last = end(request_id, reason, completion_tokens=choice + 1, cached_tokens=2 * choice)
        told.append(Pieces([piece(f"{choice}", request_id, tokens)], (last,)))
    return told


async def test_choices_are_told_by_their_number() -> None:
    reply = (await Backend(by_choice).post(CHATS, {**CHAT, "n": 3})).json()
    choices = reply["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in choices] == ["0", "1", "2"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length", "stop"]


async def test_a_prompt_is_counted_once_and_what_is_produced_altogether() -> None:
    reply = (await Backend(by_choice).post(CHATS, {**CHAT, "n": 3})).json()
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_they_are_one_prompt_on_its_way() -> None:
    backend = Backend(by_choice)
    await backend.post(CHATS, {**CHAT, "n": 3, "seed": 5})
    [prompt] = backend.prompts()
    assert (prompt.choices, prompt.sampling.seed) == (3, 5)


async def test_several_prompts_have_their_choices_in_order() -> None:
    backend = Backend(by_choice)
    body = completion(prompt=["a", "b"], n=2, seed=5)
    reply = (await backend.post(COMPLETIONS, body)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == ["0", "1", "0", "1"]
    assert reply["usage"]["prompt_tokens"] == 6
    first, second = backend.prompts()
    assert (first.text, second.text) == ("a", "b")
    assert second.sampling.seed == seed_of(5, 2)  # that of the third choice


async def test_token_ids_may_be_one_prompt_or_several() -> None:
    backend = Backend(by_choice)
    for prompt, count in (([1, 2], 1), ([[1, 2], [3]], 2), (["a", [3]], 2)):
        reply = (await backend.post(COMPLETIONS, completion(prompt=prompt))).json()
        assert len(reply["choices"]) == count


async def test_the_best_are_those_with_the_likeliest_tokens() -> None:
    """Means of 0, -2, -4, -1 and -3."""
    backend = Backend(by_choice)
    reply = (await backend.post(COMPLETIONS, completion(n=2, best_of=5))).json()
    assert [choice["text"] for choice in reply["choices"]] == ["0", "3"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in reply["choices"]] == [None, None]
    assert reply["usage"]["completion_tokens"] == 15


async def test_the_mean_is_over_tokens_not_their_sum() -> None:
    def answer(prompt: Prompt) -> list[Pieces]:
        first = prompt.request_id
        long = [TokenDetail(1, "a", -1.0, False)] * 4
        short = [TokenDetail(1, "b", -2.0, False)]
        ends = (end(first), end(first + 1))
        return [Pieces([piece("long", first, long), piece("short", first + 1, short)], ends)]

    reply = (await Backend(answer).post(COMPLETIONS, completion(best_of=2))).json()
    assert [choice["text"] for choice in reply["choices"]] == ["long"]


async def test_a_stream_interleaves_choices_and_ends_each() -> None:
    reply = await Backend(by_choice).post(
        CHATS, {**CHAT, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    )
    chunks = events(reply.text)
    assert chunks.pop() == "[DONE]"
    assert chunks.pop()["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in chunks}) == 1
    texts: defaultdict[int, str] = defaultdict(str)
    reasons = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "0", 1: "1", 2: "2"}
    assert reasons == {0: "stop", 1: "length", 2: "stop"}
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles.count("assistant") == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_comes_before_each_choice(stream: bool) -> None:
    backend = Backend(says("!", "?"))
    reply = await backend.post(COMPLETIONS, completion(echo=True, n=2, stream=stream))
    if stream:
        chunks = [one for one in events(reply.text) if one != "[DONE]"]
        choices = [chunk["choices"][0] for chunk in chunks]
    else:
        choices = reply.json()["choices"]
    texts: defaultdict[int, str] = defaultdict(str)
    for choice in choices:
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "Hi!?", 1: "Hi!?"}
    assert all(choice["logprobs"] is None for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_has_the_logprobs_of_its_prompt(stream: bool) -> None:
    backend = Backend(says("!", "?"))
    reply = await backend.post(COMPLETIONS, completion(echo=True, logprobs=1, stream=stream))
    chunks = [one for one in events(reply.text) if one != "[DONE]"] if stream else [reply.json()]
    parts = [one for chunk in chunks if (one := chunk["choices"][0]["logprobs"]) is not None]
    assert [one for part in parts for one in part["tokens"]] == ["H", "i", "!", "?"]
    assert [one for part in parts for one in part["token_logprobs"]] == [None, -0.5, -0.5, -0.5]
    assert [one for part in parts for one in part["text_offset"]] == [0, 1, 2, 3]
    [prompt] = backend.prompts()
    assert prompt.logprobs is not None
    assert (prompt.logprobs.top, prompt.logprobs.prompt_top) == (1, 1)


async def test_the_text_of_token_ids_is_echoed_too() -> None:
    reply = (await Backend(says("!")).post(COMPLETIONS, completion(echo=True, prompt=[1]))).json()
    assert reply["choices"][0]["text"] == "ids!"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_length_of_nothing_gives_the_prompt_alone(stream: bool) -> None:
    backend = Backend(says("!"))
    body = completion(echo=True, logprobs=0, max_tokens=0, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    reply = await backend.post(COMPLETIONS, body)
    chunks = [one for one in events(reply.text) if one != "[DONE]"] if stream else [reply.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hi"
    assert choices[0]["logprobs"]["tokens"] == ["H", "i"]
    assert choices[-1]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 0
    assert backend.prompts()[0].max_tokens == 1


async def test_when_one_choice_fails_the_request_does_and_the_others_are_cancelled() -> None:
    def answer(prompt: Prompt) -> list[Pieces]:
        failed = failure(FailureKind.OVERLOADED, 429, "too much")
        return [Pieces([], (end(prompt.request_id + 1, failure=failed),))]

    backend = Backend(answer)
    reply = await backend.post(CHATS, {**CHAT, "n": 3})
    assert reply.status_code == 429
    assert reply.json()["error"]["message"] == "too much"
    first = backend.prompts()[0].request_id
    assert backend.cancelled() == [first, first + 2]


async def test_a_stream_in_which_one_choice_fails_says_so_and_ends() -> None:
    backend = Backend(fails(failure(FailureKind.INTERNAL, 500, "broken"), "Hel"))
    reply = await backend.post(CHATS, {**CHAT, "n": 2, "stream": True})
    told = events(reply.text)
    assert told[-1]["error"]["message"] == "broken"
    assert len(backend.cancelled()) == 1


async def test_when_the_client_goes_all_choices_are_cancelled() -> None:
    backend = Backend()
    connection = Connection(backend, COMPLETIONS, completion(prompt=["a", "b"], n=2))
    while len(backend.prompts()) < 2:
        await asyncio.sleep(0)
    connection.go()
    await connection.task
    first = backend.prompts()[0].request_id
    assert backend.cancelled() == list(request_ids(first, 4))
    assert backend.downstream.admission.in_flight == 0


async def test_a_model_is_found_by_its_id() -> None:
    backend = Backend()
    assert (await backend.get("/v1/models/some/base")).json()["id"] == "some/base"
    missing = await backend.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
