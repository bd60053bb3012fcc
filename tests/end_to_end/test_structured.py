"""Structured output and tools through the whole server, with an adapter and without."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import lorax
import openai
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server
from tests.end_to_end.weather import TOOL, Weather

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
}
HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.make_model(folder / "model", model_folder)
    tiny.make_adapter(folder / "root" / "good", model, 1)
    return serve(model_folder=model, adapter_root=folder / "root", dtype="float32", rows=8)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0)


def told(client: openai.OpenAI, model: str = "", **given: Any) -> str:
    reply = client.chat.completions.create(model=model, messages=HI, max_tokens=200, **given)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize("model", ["", "good"])
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_a_schema_is_followed(client: openai.OpenAI, model: str, temperature: float) -> None:
    text = told(client, model, response_format=FORMAT, temperature=temperature)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_schema_is_followed_in_a_stream(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="good", messages=HI, response_format=FORMAT, max_tokens=200, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[a-c]{3,5}!"}, "[a-c]{3,5}!"),
        ({"guided_grammar": 'root ::= "<" [0-9]{2} ">"'}, "<[0-9]{2}>"),
        ({"structured_outputs": {"grammar": 'start: "(" /[xy]{2}/ ")"'}}, r"\([xy]{2}\)"),
    ],
)
def test_vllms_words_are_followed(
    client: openai.OpenAI, given: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, told(client, extra_body=given))
    reply = client.completions.create(model="", prompt="Hi", extra_body=given, max_tokens=50)
    assert re.fullmatch(pattern, reply.choices[0].text)


def test_loraxs_routes_follow_a_schema(server: Server) -> None:
    found = lorax.Client(server.url).generate(
        "Hi", response_format={"type": "json_object", "schema": SCHEMA}, max_new_tokens=200
    )
    jsonschema.validate(json.loads(found.generated_text), SCHEMA)
    regex = {"type": "regex", "value": "[0-9]{3}"}
    reply = server.generate("Hi", "good", grammar=regex, ignore_eos_token=False, max_new_tokens=9)
    assert re.fullmatch("[0-9]{3}", reply["generated_text"])
    assert reply["details"]["finish_reason"] == "eos_token"


def test_rows_with_and_without_grammars_share_steps(server: Server, client: openai.OpenAI) -> None:
    alone = server.token_ids("Once upon a time", max_new_tokens=60)
    with ThreadPoolExecutor(7) as threads:
        free = threads.submit(server.token_ids, "Once upon a time", max_new_tokens=60)
        bound = [
            threads.submit(told, client, "good" if n % 2 else "", response_format=FORMAT, seed=n)
            for n in range(6)
        ]
        for one in bound:
            jsonschema.validate(json.loads(one.result()), SCHEMA)
        assert free.result() == alone


def test_a_bad_schema_is_one_422_that_names_what_is_wrong(
    server: Server, client: openai.OpenAI
) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    for _ in range(2):  # the second is known
        with pytest.raises(openai.UnprocessableEntityError, match="not") as refused:
            told(client, response_format=bad)
        assert refused.value.code == "invalid_grammar"
    body = {"inputs": "Hi", "parameters": {"grammar": {"type": "regex", "value": "("}}}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert reply.status_code == 422
    assert "unclosed group" in reply.json()["error"]
    ignoring = {"guided_choice": ["a"], "ignore_eos": True}
    with pytest.raises(openai.BadRequestError, match="ignore_eos"):
        told(client, extra_body=ignoring)
    assert told(client, extra_body={"guided_choice": ["fine"]}) == "fine"


def test_a_tool_is_called_and_what_it_gave_is_told(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="good",
        messages=HI,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    message: Any = choice.message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
    told_back: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    again = client.chat.completions.create(
        model="good", messages=[*HI, message, told_back], tools=[TOOL], max_tokens=3
    )
    assert again.usage is not None
    assert reply.usage is not None
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_named_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    with client.chat.completions.stream(
        model="", messages=HI, tools=[TOOL], tool_choice=named, max_tokens=200, seed=3
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    assert final.choices[0].finish_reason == "tool_calls"
