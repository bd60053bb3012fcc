"""Chats with tools, for templates that know them and for those that do not."""

import json
from typing import Any

import pytest

from pipeline.errors import RequestError
from pipeline.messages import Tools
from tokenizer_workers.chat_template import ChatTemplate
from tokenizer_workers.tool_formats import FORMATS
from tokenizer_workers.tool_use import ToolUse

TOOLS = Tools([{"name": "add", "parameters": {"type": "object"}, "strict": True}])
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
KNOWS_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "3"}]},
]


def rendered(source: str, chat: list[dict[str, Any]], tools: Tools | None, form: str) -> str:
    template = ChatTemplate(source, {})
    use = ToolUse(
        FORMATS[form],
        template_shows_tools=template.shows_tools,
        template_takes_system=template.takes_system,
        token_id=lambda _: None,
    )
    return template.render(*use.chat(chat, tools))


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects() -> None:
    text = rendered(KNOWS_TOOLS, CHAT, TOOLS, "hermes")
    listed, _, rest = text.partition("<user>")
    assert json.loads(listed) == [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ]
    assert rest.count('{"name": "add", "arguments": {"a": 1}}') == 2
    assert rest.endswith("<tool>2<tool>3")


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    call = {**CALL, "function": {"name": "add", "arguments": "a=1"}}
    text = rendered(KNOWS_TOOLS, [{"role": "assistant", "tool_calls": [call]}], TOOLS, "hermes")
    assert '"arguments": "a=1"' in text


@pytest.mark.parametrize("form", FORMATS)
def test_another_template_is_told_of_them_in_words(form: str) -> None:
    text = rendered(PLAIN, CHAT, TOOLS, form)
    assert text.startswith("<system>")
    assert '"name": "add"' in text.partition("<user>")[0]
    assert "strict" not in text
    key = FORMATS[form].arguments[0]
    assert text.count(f'{{"name": "add", "{key}": {{"a": 1}}}}') == 2
    assert text.endswith(
        "<user><tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    )


def test_the_explanation_joins_a_system_message_that_is_there() -> None:
    chat = [{"role": "system", "content": "Be kind."}, *CHAT[:1]]
    text = rendered(PLAIN, chat, TOOLS, "hermes")
    assert text.startswith("<system>Be kind.\n\n")
    assert text.count("<system>") == 1
    assert text.endswith("<user>add")


def test_where_there_is_no_system_message_the_first_message_explains() -> None:
    text = rendered(NO_SYSTEM, CHAT[:1], TOOLS, "hermes")
    assert text.startswith("<user>")
    assert text.endswith("\n\nadd")


def test_the_client_may_word_the_explanation() -> None:
    tools = Tools(TOOLS.functions, prompt="Use these:")
    assert rendered(PLAIN, CHAT[:1], tools, "hermes").startswith('<system>Use these:\n{"type"')


def test_earlier_calls_are_told_without_tools_too() -> None:
    text = rendered(PLAIN, CHAT, None, "hermes")
    assert text.count("<tool_call>") == 2
    assert "<system>" not in text


def test_a_chat_without_tools_is_what_it_was() -> None:
    assert rendered(PLAIN, CHAT[:1], None, "hermes") == "<user>add"
    assert rendered(KNOWS_TOOLS, CHAT[:1], None, "hermes") == "<user>add"


def test_a_template_that_refuses_a_chat_still_says_so() -> None:
    with pytest.raises(RequestError):
        rendered(NO_SYSTEM, [{"role": "system", "content": "x"}], None, "hermes")
