"""What clients say of templates, and what of it is refused."""

from typing import Any

import pytest

from frontend.adapters import AdapterNames
from frontend.openai import OpenAI
from pipeline.messages import ChatOptions
from tests.frontend.fakes import BASE, call_of, json_of, refusal_of
from tests.frontend.test_openai import chat


def routes(*, allow_chat_template: bool = True) -> OpenAI:
    names = AdapterNames(base_model=BASE, default_source="auto", sources=("local",), roots=())
    return OpenAI(
        base_model=BASE,
        adapters=names,
        max_stop_sequences=4,
        max_choices=4,
        allow_chat_template=allow_chat_template,
    )


def options(**fields: Any) -> ChatOptions:
    return call_of(routes().chat(chat(**fields), None)).prompt.chat_options


def error(allow: bool = True, **fields: Any) -> tuple[str, str]:
    refusal = refusal_of(routes(allow_chat_template=allow).chat(chat(**fields), None))
    assert refusal.status == 400
    told = json_of(refusal)["error"]
    return told["param"], told["message"]


def nested(depth: int) -> Any:
    value: Any = 1
    for at in range(depth):
        value = [value] if at % 2 else {"y": value}
    return value


def test_a_chat_that_says_nothing_of_it_is_rendered_as_the_model_does() -> None:
    assert options() == ChatOptions()
    nothing = ("chat_template", "chat_template_kwargs", "documents", "add_generation_prompt")
    assert options(**dict.fromkeys(nothing)) == ChatOptions()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chat_template": "{{ 1 }}"}, {"template": "{{ 1 }}"}),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"variables": {"enable_thinking": False}},
        ),
        ({"documents": [{"title": "a"}]}, {"documents": [{"title": "a"}]}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"add_special_tokens": True}, {"add_special_tokens": True}),
        (
            {"continue_final_message": True},
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
    ],
)
def test_a_field_reaches_the_template(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert options(**fields) == ChatOptions(**expected)


def test_what_is_nested_a_little_less_deeply_travels() -> None:
    assert options(chat_template_kwargs={"x": nested(97)}).variables == {"x": nested(97)}


def test_a_template_of_the_requests_own_is_the_operators_to_allow() -> None:
    parameter, message = error(allow=False, chat_template="{{ 1 }}")
    assert parameter == "chat_template"
    assert "allow_chat_template is off" in message
    quiet = call_of(routes(allow_chat_template=False).chat(chat(chat_template=""), None))
    assert quiet.prompt.chat_options == ChatOptions()


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"x": 1 << 70}}, "chat_template_kwargs"),
        ({"documents": [{"x": -(1 << 70)}]}, "documents"),
        ({"chat_template_kwargs": {"x": nested(99)}}, "chat_template_kwargs"),
        ({"documents": [{"x": nested(900)}]}, "documents"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], parameter: str) -> None:
    assert error(**fields)[0] == parameter
