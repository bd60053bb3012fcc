"""Tools of a chat: what is asked for, and calls in replies as OpenAI writes them."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import openai
import pydantic
import pytest

from frontend.openai_replies import ChatShape
from frontend.tool_call_replies import ID_CHARACTERS
from pipeline.messages import (
    FinishReason,
    Grammar,
    GrammarKind,
    Piece,
    Pieces,
    Prompt,
    ToolCallPart,
    ToolChoice,
    Tools,
)
from tests.frontend.fakes import end, json_of, piece, streamed
from tests.frontend.running import Running
from tests.frontend.test_openai import chat_prompt, error_of_chat

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "the time", "strict": True}}
PLAIN: list[dict[str, Any]] = [
    {"name": "add", "parameters": PARAMETERS},
    {"name": "now", "description": "the time", "strict": True},
]
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("given", "tools"),
    [
        ({}, Tools(PLAIN)),
        ({"tool_choice": "auto"}, Tools(PLAIN)),
        ({"tool_choice": "none"}, Tools(PLAIN, ToolChoice.NONE)),
        ({"tool_choice": "required"}, Tools(PLAIN, ToolChoice.REQUIRED)),
        ({"tool_choice": NAMED}, Tools(PLAIN, ToolChoice.REQUIRED, only="now", parallel=False)),
        ({"tool_choice": "now"}, Tools(PLAIN, ToolChoice.REQUIRED, only="now", parallel=False)),
        ({"parallel_tool_calls": False}, Tools(PLAIN, parallel=False)),
        ({"parallel_tool_calls": True, "tool_prompt": "Use:"}, Tools(PLAIN, prompt="Use:")),
    ],
)
def test_tools_and_their_choice_go_with_the_prompt(given: dict[str, Any], tools: Tools) -> None:
    assert chat_prompt(tools=[ADD, NOW], **given).tools == tools


def test_a_chat_without_tools_has_none() -> None:
    assert chat_prompt().tools is None
    assert chat_prompt(tools=[], tool_choice="auto", parallel_tool_calls=True).tools is None


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD], "tool_choice": "sub"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "guided_regex": "a"}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]},
            "tools",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(given: dict[str, Any], parameter: str) -> None:
    assert error_of_chat(**given)["param"] == parameter


@pytest.mark.parametrize("value", [1 << 70, [[]]], ids=["integer", "nested"])
def test_parameters_that_no_message_can_carry_are_refused(value: Any) -> None:
    if isinstance(value, list):
        for _ in range(900):
            value = [value]
    function = {"name": "f", "parameters": {"const": value}}
    error = error_of_chat(tools=[{"type": "function", "function": function}])
    assert error["param"] == "tools"


def test_a_reply_may_be_a_call_or_match_a_schema() -> None:
    prompt = chat_prompt(tools=[ADD], response_format={"type": "json_object"})
    assert prompt.grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')
    assert prompt.tools is not None


def test_calls_and_what_they_gave_go_back_into_the_chat() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    parsed = {**call, "function": {**call["function"], "parsed_arguments": {"a": 1}}}  # type: ignore[dict-item]
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [parsed], "parsed": None},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    assert chat_prompt(messages=messages).chat == [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def parts(*given: tuple[int, str, str]) -> tuple[ToolCallPart, ...]:
    return tuple(ToolCallPart(index, name, arguments) for index, name, arguments in given)


TWO_CALLS = [
    Piece(1, "So: ", (), parts((0, "add", ""))),
    Piece(1, "", (), parts((0, "", '{"a"'), (0, "", ": 1}"), (1, "now", ""), (1, "", "{}"))),
]


def shape() -> ChatShape:
    return ChatShape(model="m", include_usage=False, may_call=True)


def test_a_whole_reply_with_calls() -> None:
    (choice,) = json_of(shape().whole(TWO_CALLS, end()))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(one) == ID_CHARACTERS and one.isalnum() for one in ids)
    assert message == {
        "role": "assistant",
        "content": "So: ",
        "refusal": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


def test_without_text_the_content_of_calls_is_null() -> None:
    (choice,) = json_of(shape().whole([Piece(1, "", (), TWO_CALLS[1].tool_calls[2:])], end()))[
        "choices"
    ]
    assert choice["message"]["content"] is None


def test_a_reply_that_may_call_and_does_not_is_as_any_other() -> None:
    (choice,) = json_of(shape().whole([piece("Hi")], end()))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_reply_that_was_cut_off_says_so() -> None:
    (choice,) = json_of(shape().whole(TWO_CALLS, end(reason=FinishReason.LENGTH)))["choices"]
    assert choice["finish_reason"] == "length"


def test_the_chunks_of_a_stream_with_calls() -> None:
    chunks = streamed(shape(), *TWO_CALLS, last=end())
    assert chunks.pop() == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["tool_calls"]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    assert deltas[1] == {"content": "So: "}
    assert deltas[-1] == {}
    calls = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert [call["index"] for call in calls] == [0, 0, 0, 1, 1]
    assert [call.get("type") for call in calls] == ["function", None, None, "function", None]
    assert [call["function"].get("name") for call in calls] == ["add", None, None, "now", None]
    assert all(("id" in call) == ("type" in call) for call in calls)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def talking(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="EMPTY", max_retries=0) as one:
        yield one


class Sum(pydantic.BaseModel):
    a: int


class Person(pydantic.BaseModel):
    name: str
    age: int


def calls_add(prompt: Prompt) -> Iterable[Pieces]:
    """As a model would whose reply is cut in awkward places."""
    request_id = prompt.request_id
    for more in (parts((0, "Sum", "")), parts((0, "", '{"a')), parts((0, "", '": 7}'))):
        yield Pieces([Piece(request_id, "", (), more)])
    yield Pieces([], (end(request_id),))


def tells_a_person(prompt: Prompt) -> Iterable[Pieces]:
    request_id = prompt.request_id
    for text in ('{"name": "Bo', 'b", "age": 31}'):
        yield Pieces([piece(text, request_id)])
    yield Pieces([], (end(request_id),))


HI: Any = [{"role": "user", "content": "Hi"}]
SUM = openai.pydantic_function_tool(Sum)


def test_openais_client_parses_calls(served: Running, talking: openai.OpenAI) -> None:
    served.backend.answer = calls_add
    reply = talking.chat.completions.parse(model="", messages=HI, tools=[SUM])
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Sum(a=7)
    asked = served.backend.prompts()[-1].tools
    assert asked is not None
    assert asked.functions[0]["strict"] is True


def test_openais_client_parses_a_model(served: Running, talking: openai.OpenAI) -> None:
    served.backend.answer = tells_a_person
    reply = talking.chat.completions.parse(model="", messages=HI, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Bob", age=31)
    grammar = served.backend.prompts()[-1].grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA


def test_openais_client_sends_back_what_it_has_parsed(
    served: Running,
    talking: openai.OpenAI,
) -> None:
    served.backend.answer = calls_add
    reply = talking.chat.completions.parse(model="", messages=HI, tools=[SUM])
    message: Any = reply.choices[0].message
    assert message.tool_calls
    told: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"}
    talking.chat.completions.create(model="", messages=[*HI, message, told], tools=[SUM])
    chat = served.backend.prompts()[-1].chat
    assert chat is not None
    assert chat[1]["tool_calls"][0]["function"] == {"name": "Sum", "arguments": '{"a": 7}'}


def test_openais_client_streams_calls(served: Running, talking: openai.OpenAI) -> None:
    served.backend.answer = calls_add
    with talking.chat.completions.stream(model="", messages=HI, tools=[SUM]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Sum(a=7)


def test_openais_client_streams_a_model(served: Running, talking: openai.OpenAI) -> None:
    served.backend.answer = tells_a_person
    with talking.chat.completions.stream(model="", messages=HI, response_format=Person) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(name="Bob", age=31)


def test_openais_asynchronous_client_parses_and_streams(served: Running) -> None:
    served.backend.answer = calls_add

    async def both() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="EMPTY") as awaited:
            whole = await awaited.chat.completions.parse(model="", messages=HI, tools=[SUM])
            async with awaited.chat.completions.stream(
                model="", messages=HI, tools=[SUM]
            ) as stream:
                await stream.until_done()
                return whole, await stream.get_final_completion()

    for reply in asyncio.run(both()):
        (call,) = reply.choices[0].message.tool_calls
        assert call.function.parsed_arguments == Sum(a=7)
