"""Chats are rendered as transformers renders them, and errors are the client's to read."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, RequestError
from pipeline.messages import ChatOptions, FailureKind
from tokenizer_workers.chat_template import ChatTemplate, find_source, special_tokens

LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
"""
JSON_LINES = """\
{%- for message in messages -%}
{%- if message.role == 'skip' %}{% continue %}{% endif -%}
{{ message | tojson }}{{ message | tojson(indent=2, sort_keys=true) }}
{% if not loop.last %}{{ unset_token }}{% endif %}
{%- endfor -%}
"""
PARTS = """\
{% for message in messages %}<{{ message.role }}>{% for part in message.content %}\
{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = [LLAMA_3, MISTRAL, JSON_LINES]


def expected(template: str, messages: list[dict[str, Any]]) -> str:
    fast: Any = PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = fast(tokenizer_object=words, chat_template=template, **TOKENS)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def user(content: object, **given: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **given}


contents = st.text(alphabet="ab é<>'\"\n{}%🦙", max_size=12)
chats = st.lists(contents, min_size=1, max_size=5).map(
    lambda texts: [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
)


@pytest.mark.parametrize("template", TEMPLATES)
@given(messages=chats)
def test_a_chat_is_rendered_as_transformers_does(
    template: str, messages: list[dict[str, Any]]
) -> None:
    rendered = ChatTemplate(template, TOKENS).render(messages)
    assert rendered == expected(template, messages)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@given(messages=chats)
def test_the_default_models_chats_are_those_of_transformers(
    oracle: Any, messages: list[dict[str, Any]]
) -> None:
    template = ChatTemplate(oracle.chat_template, TOKENS)
    assert template.render(messages) == oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_what_is_none_counts_as_missing() -> None:
    messages = [user("Hi", name=None, tool_calls=None)]
    assert ChatTemplate(JSON_LINES, TOKENS).render(messages) == expected(JSON_LINES, messages)


def test_text_parts_are_joined_for_a_template_that_wants_text() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}", {})
    assert template.render([user(parts)]) == "Hello there"


def test_a_template_that_wants_parts_gets_them_whatever_the_client_sent() -> None:
    template = ChatTemplate(PARTS, {})
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert template.render([user(parts), user("!")]) == "<user>Hello there<user>!"
    assert template.render([user(parts)]) == expected(PARTS, [user(parts)])


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "content parts of type `image_url` are not supported; only `text` is",
        ),
        ({"type": "text"}, 'a content part must look like {"type": "text", "text": "..."}'),
        ({"type": "text", "text": 5}, 'a content part must look like {"type": "text", '),
        ("loose text", 'a content part must look like {"type": "text", "text": "..."}'),
    ],
)
def test_a_part_that_is_not_text_is_refused(part: object, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ messages[0].content }}", {}).render([user([part])])
    assert caught.value.kind == FailureKind.VALIDATION
    assert caught.value.message.startswith(sentence)


def test_a_chat_without_messages_is_refused() -> None:
    with pytest.raises(RequestError, match="`messages` cannot be empty"):
        ChatTemplate("{{ messages }}", {}).render([])


def test_the_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(MISTRAL, TOKENS).render([user("Hi"), user("Hi again")])
    assert (caught.value.status, caught.value.kind) == (422, FailureKind.TEMPLATE)
    assert caught.value.message.startswith("Conversation roles must alternate")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_whatever_a_template_raises_is_the_clients_error(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(template, {}).render([user("Hi")])
    assert caught.value.kind == FailureKind.TEMPLATE


def test_a_source_that_is_no_template_is_the_operators_error() -> None:
    with pytest.raises(ConfigError, match=r"chat template cannot be used: .*\(line 2\)"):
        ChatTemplate("\n{% for %}", {})


def test_a_template_can_ask_for_the_date() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    assert int(template.render([user("Hi")])) - datetime.now().year in (-1, 0)


def test_the_template_file_wins_over_the_tokenizers_configuration() -> None:
    named = [{"name": "tool_use", "template": "c"}, {"name": "default", "template": "b"}]
    assert find_source({"chat_template": "b"}, "a") == "a"
    assert find_source({"chat_template": "b"}, None) == "b"
    assert find_source({"chat_template": named}, None) == "b"
    assert find_source({"chat_template": named[:1]}, None) is None
    assert find_source({}, None) is None


def test_special_tokens_are_found_in_both_spellings() -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": None,
        "model_max_length": 7,
    }
    assert special_tokens(config) == TOKENS


@given(messages=chats)
@pytest.mark.parametrize("template", [LLAMA_3, MISTRAL])
def test_a_last_message_goes_on_as_with_transformers(
    template: str, messages: list[dict[str, Any]]
) -> None:
    fast: Any = PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = fast(tokenizer_object=words, chat_template=template, **TOKENS)
    going_on = ChatOptions(continue_final_message=True, add_generation_prompt=False)
    ours = ChatTemplate(template, TOKENS).render(messages, options=going_on)
    theirs = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, continue_final_message=True
    )
    assert ours == theirs


def test_parts_go_on_too() -> None:
    going_on = ChatOptions(continue_final_message=True, add_generation_prompt=False)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    messages = [user("Hi"), {"role": "assistant", "content": parts}]
    assert ChatTemplate(PARTS + "<end>", {}).render(messages, options=going_on) == (
        "<user>Hi<assistant>ab "
    )


@pytest.mark.parametrize("last", [{"role": "assistant"}, {"role": "assistant", "content": []}])
def test_a_message_without_a_text_cannot_go_on(last: dict[str, Any]) -> None:
    going_on = ChatOptions(continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(RequestError, match="no content that could be continued"):
        ChatTemplate(PARTS, {}).render([last], options=going_on)
    with pytest.raises(RequestError, match="does not show the last message"):
        ChatTemplate("{{ messages[0].role }}", {}).render([user("Hi")], options=going_on)


def test_variables_documents_and_tools_reach_the_template() -> None:
    template = ChatTemplate(
        "{{ mode }}{{ documents[0].title }}{{ tools[0].name }}{{ add_generation_prompt }}"
        "{{ bos_token }}",
        TOKENS,
    )
    options = ChatOptions(
        variables={"mode": "fast ", "bos_token": "<other>"},
        documents=[{"title": "A "}],
        add_generation_prompt=False,
    )
    assert template.render([user("Hi")], [{"name": "f "}], options) == "fast A f False<other>"


def test_an_error_of_a_template_says_its_line() -> None:
    template = "{% for m in messages %}\n\n{{ m.nothing.at_all }}{% endfor %}"
    with pytest.raises(RequestError) as caught:
        ChatTemplate(template, {}).render([user("Hi")])
    assert caught.value.status == 422
    assert caught.value.message.endswith("(line 3)")
    with pytest.raises(RequestError, match=r"must alternate.* \(line 3\)"):
        ChatTemplate(MISTRAL, TOKENS).render([user("Hi"), user("Hi again")])
