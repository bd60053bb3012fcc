"""What OpenAI's client does on top of requests: parsing, accumulated streams, tasks, pages."""

import asyncio
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.end_to_end.server import Server, eventually

HI: Any = [{"role": "user", "content": "Hi"}]
MODELS = ["", "good"]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(pydantic.BaseModel):
    colour: Colour
    grams: int = pydantic.Field(ge=0, le=99)
    of: str | None = pydantic.Field(max_length=8)


class Thing(pydantic.BaseModel):
    """With what pydantic writes down as `$ref`, `anyOf`, `enum` and `items`."""

    name: str = pydantic.Field(max_length=10)
    fragile: bool
    parts: list[Part] = pydantic.Field(min_length=1, max_length=2)


class Sum(pydantic.BaseModel):
    """Add two numbers."""

    a: int = pydantic.Field(ge=0, le=9)
    b: int = pydantic.Field(ge=0, le=9)


SUM = openai.pydantic_function_tool(Sum)
ASKED: Any = {"messages": HI, "max_tokens": 400, "seed": 1, "temperature": 0.5}
CALLED: Any = {
    **ASKED,
    "max_tokens": 300,
    "tools": [SUM],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}


@pytest.fixture(scope="module")
def server(serve_tiny: Callable[..., Server]) -> Server:
    return serve_tiny("good", "better", rows=8)


@pytest.mark.parametrize("model", MODELS)
def test_a_reply_is_parsed(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.parse(model=model, response_format=Thing, n=2, **ASKED)
    for choice in reply.choices:
        thing = choice.message.parsed
        assert isinstance(thing, Thing)
        assert 1 <= len(thing.parts) <= 2
        assert json.loads(choice.message.content or "") == thing.model_dump(mode="json")


@pytest.mark.parametrize("model", MODELS)
def test_a_call_is_parsed(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.parse(model=model, n=2, **CALLED)
    for choice in reply.choices:
        [call] = choice.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Sum)


def test_a_reply_that_was_cut_off_is_not_parsed(client: openai.OpenAI) -> None:
    cut: Any = {**ASKED, "max_tokens": 3}
    with pytest.raises(openai.LengthFinishReasonError) as told:
        client.chat.completions.parse(model="", response_format=Thing, **cut)
    usage = told.value.completion.usage
    assert usage is not None
    assert usage.completion_tokens == 3


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_parsed_and_tells_what_a_whole_reply_tells(
    client: openai.OpenAI, model: str
) -> None:
    whole = client.chat.completions.parse(model=model, response_format=Thing, **ASKED)
    text, done = "", []
    with client.chat.completions.stream(
        model=model, response_format=Thing, stream_options={"include_usage": True}, **ASKED
    ) as stream:
        for event in stream:
            if event.type == "content.delta":
                text += event.delta
                assert event.snapshot == text
            elif event.type == "content.done":
                done.append(event.parsed)
        final = stream.get_final_completion()
    assert done == [whole.choices[0].message.parsed] == [final.choices[0].message.parsed]
    assert text == whole.choices[0].message.content
    assert final.usage == whole.usage


def test_a_stream_tells_of_each_call_once(client: openai.OpenAI) -> None:
    arguments, done = "", []
    with client.chat.completions.stream(model="good", **CALLED) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                assert event.name == "Sum"
                arguments += event.arguments_delta
            elif event.type == "tool_calls.function.arguments.done":
                done.append(event)
    [one] = done
    assert one.arguments == arguments
    assert one.parsed_arguments == Sum.model_validate_json(arguments)


def test_tokens_are_told_in_events(client: openai.OpenAI) -> None:
    told = []
    with client.chat.completions.stream(
        model="", response_format=Thing, logprobs=True, top_logprobs=1, **ASKED
    ) as stream:
        for event in stream:
            if event.type == "logprobs.content.delta":
                told += event.content
        final = stream.get_final_completion()
    text = b"".join(bytes(token.bytes or []) for token in told).decode()
    assert text == final.choices[0].message.content


def test_all_of_it_in_tasks(server: Server, client: openai.OpenAI) -> None:
    async def ask() -> tuple[list[Thing | None], Any, list[str]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x") as awaited:
            parsed = await asyncio.gather(
                *(
                    awaited.chat.completions.parse(model=model, response_format=Thing, **ASKED)
                    for model in (*MODELS, "better")
                )
            )
            async with awaited.chat.completions.stream(model="good", **CALLED) as stream:
                final = await stream.get_final_completion()
            models = [model.id async for model in awaited.models.list()]
        return [one.choices[0].message.parsed for one in parsed], final, models

    things, final, models = asyncio.run(ask())
    assert all(isinstance(one, Thing) for one in things)
    [call] = final.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)
    assert models == [model.id for model in client.models.list()]


def test_the_models_are_one_page(client: openai.OpenAI) -> None:
    page = client.models.list()
    assert [model.id for model in page.data][1:] == ["better", "good"]
    assert not page.has_next_page()
    assert [model.id for found in page.iter_pages() for model in found.data] == [
        model.id for model in page
    ]
    for model in page:
        assert client.models.retrieve(model.id) == model


def test_a_reply_is_had_as_it_was_sent(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="", messages=HI, max_tokens=2)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].finish_reason == "length"
    with client.completions.with_streaming_response.create(
        model="good", prompt="Hi", max_tokens=2, stream=True
    ) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_a_stream_that_is_left_is_cancelled(server: Server, client: openai.OpenAI) -> None:
    def cancelled() -> bool:
        return 'status="499"' in httpx.get(f"{server.url}/metrics", timeout=30).text

    assert not cancelled()
    stream = client.completions.create(
        model="", prompt="Hi", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert eventually(cancelled)
