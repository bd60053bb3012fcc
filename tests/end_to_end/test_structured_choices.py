"""Several replies that must match a grammar or call tools, and what is told of their tokens."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import lorax
import openai
import pytest

from tests.end_to_end.server import Server
from tests.end_to_end.weather import TOOL, Weather
from tests.frontend.fakes import events

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "n": {"enum": [*range(100)]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
}
HI: Any = [{"role": "user", "content": "Hi"}]
MODELS = ["", "good"]


@pytest.fixture(scope="module")
def server(serve_tiny: Callable[..., Server]) -> Server:
    return serve_tiny("good", rows=8)


def called(calls: Any) -> None:
    """Each is one of the tool, as it is described."""
    assert calls
    for call in calls:
        assert call.function.name == "Weather"
        Weather.model_validate_json(call.function.arguments)


@pytest.mark.parametrize("model", MODELS)
def test_each_choice_follows_the_schema(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HI, response_format=FORMAT, n=3, seed=1, max_tokens=200
    )
    texts = [choice.message.content or "" for choice in reply.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1
    assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 3


@pytest.mark.parametrize("model", MODELS)
def test_each_choice_follows_the_schema_in_a_stream(client: openai.OpenAI, model: str) -> None:
    given: Any = {"messages": HI, "response_format": FORMAT, "n": 3, "seed": 1, "max_tokens": 200}
    whole = client.chat.completions.create(model=model, **given)
    texts: defaultdict[int, str] = defaultdict(str)
    reasons = {}
    for chunk in client.chat.completions.create(model=model, stream=True, **given):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Weather"}}]
)
def test_each_choice_calls_a_tool(client: openai.OpenAI, model: str, choice: Any) -> None:
    reply = client.chat.completions.create(
        model=model,
        messages=HI,
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        n=2,
        seed=1,
        max_tokens=300,
    )
    assert len(reply.choices) == 2
    for one in reply.choices:
        assert one.finish_reason == "tool_calls"
        called(one.message.tool_calls)
        assert one.message.content is None
    ids = [call.id for one in reply.choices for call in one.message.tool_calls or []]
    assert len(set(ids)) == len(ids)


def test_each_choice_calls_a_tool_in_a_stream(client: openai.OpenAI) -> None:
    given: Any = {
        "messages": HI,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        "seed": 1,
        "max_tokens": 300,
    }
    whole = client.chat.completions.create(model="good", **given)
    with client.chat.completions.stream(model="good", **given) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert len(final.choices) == 2
    for ours, one in zip(final.choices, whole.choices, strict=True):
        called(ours.message.tool_calls)
        assert ours.finish_reason == one.finish_reason == "tool_calls"
        [streamed], [expected] = ours.message.tool_calls or [], one.message.tool_calls or []
        assert streamed.function.arguments == expected.function.arguments


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_choices_may_also_not_call(client: openai.OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(
        model="", messages=HI, tools=[TOOL], tool_choice=choice, n=2, max_tokens=8, seed=1
    )
    texts = [one.message.content for one in reply.choices]
    assert all(texts)
    assert len(set(texts)) == 2


def test_a_schema_beside_tools_and_choices(client: openai.OpenAI) -> None:
    """Each choice is an answer that follows the schema, or a call."""
    reply = client.chat.completions.create(
        model="",
        messages=HI,
        tools=[TOOL],
        response_format=FORMAT,
        n=4,
        seed=1,
        max_tokens=300,
        temperature=1.5,
    )
    for one in reply.choices:
        if one.message.tool_calls:
            called(one.message.tool_calls)
        else:
            jsonschema.validate(json.loads(one.message.content or ""), SCHEMA)


@pytest.mark.parametrize("model", MODELS)
def test_the_best_of_several_follows_a_schema(server: Server, model: str) -> None:
    reply = server.generate(
        "Hi",
        model or None,
        best_of=3,
        do_sample=True,
        max_new_tokens=200,
        ignore_eos_token=False,
        response_format={"type": "json_object", "schema": SCHEMA},
    )
    best = reply["details"]
    others = best["best_of_sequences"]
    assert len(others) == 2
    for text in (reply["generated_text"], *(one["generated_text"] for one in others)):
        jsonschema.validate(json.loads(text), SCHEMA)
    means = [mean(one["tokens"]) for one in (best, *others)]
    assert means == sorted(means, reverse=True)


def mean(tokens: list[Any]) -> float:
    return float(sum(token["logprob"] for token in tokens)) / len(tokens)


def test_loraxs_client_gets_the_best_of_a_regex(server: Server) -> None:
    found = lorax.Client(server.url).generate(
        "Hi",
        best_of=2,
        do_sample=True,
        max_new_tokens=200,
        response_format={"type": "json_object", "schema": SCHEMA},
    )
    jsonschema.validate(json.loads(found.generated_text), SCHEMA)


def test_completions_keep_the_best_that_match(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="good",
        prompt=["Hi", "Ho"],
        n=2,
        best_of=3,
        max_tokens=50,
        logprobs=2,
        extra_body={"guided_regex": "[a-c]{3,5}!"},
    )
    assert len(reply.choices) == 4
    for one in reply.choices:
        assert re.fullmatch("[a-c]{3,5}!", one.text)
        assert one.logprobs is not None
        assert "".join(one.logprobs.tokens or []).startswith(one.text)


def test_a_grammar_that_is_streamed_by_loraxs_route(server: Server) -> None:
    body = {
        "inputs": "Hi",
        "parameters": {"grammar": {"type": "regex", "value": "[0-9]{3}"}, "max_new_tokens": 9},
    }
    stream = httpx.post(f"{server.url}/generate_stream", json=body, timeout=60).text
    told = events(stream)
    assert re.fullmatch("[0-9]{3}", told[-1]["generated_text"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_tokens_are_told_of_calls_and_of_content(
    client: openai.OpenAI, model: str, choice: Any
) -> None:
    """Those of calls as the model wrote them; a stream tells the same, and has content only where
    the whole reply has."""
    given: Any = {
        "messages": HI,
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "seed": 1,
        "max_tokens": 20 if choice == "auto" else 300,
    }
    whole = client.chat.completions.create(model=model, **given)
    content: defaultdict[int, str | None] = defaultdict(lambda: None)
    tokens: defaultdict[int, list[Any]] = defaultdict(list)
    for chunk in client.chat.completions.create(model=model, stream=True, **given):
        for part in chunk.choices:
            if part.delta.content is not None:
                content[part.index] = (content[part.index] or "") + part.delta.content
            if part.logprobs is not None:
                tokens[part.index] += part.logprobs.content or []
    for one in whole.choices:
        assert one.logprobs is not None
        assert one.logprobs.content
        written = b"".join(bytes(token.bytes or []) for token in one.logprobs.content).decode()
        if choice == "auto":
            assert written == one.message.content
        else:
            called(one.message.tool_calls)
            [call] = one.message.tool_calls or []
            assert call.function.arguments in written
        assert all(len(token.top_logprobs) == 2 for token in one.logprobs.content)
        assert tokens[one.index] == one.logprobs.content
        assert content[one.index] == one.message.content
