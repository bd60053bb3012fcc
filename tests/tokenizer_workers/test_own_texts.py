"""What is made of an adapter's small files, and which of them disagree with the base model."""

import json
from typing import Any

import msgspec
import pytest

from tokenizer_workers.own_texts import NOTHING, BaseTexts, OwnTexts, read_own_texts

TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
BASE = BaseTexts(
    config={
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "[PAD]",  # of which the tokenizer knows nothing
        "add_bos_token": False,  # says another thing than the tokenizer does
        "added_tokens_decoder": {"9": {"content": "<odd>"}},
    },
    id_of={"<s>": 1, "</s>": 2, "<|end|>": 3, "cat": 4, "<tool>": 5}.get,
    special={"<s>", "</s>", "<|end|>"},
    eos_ids={2},
    around=((1,), ()),
)


def read(config: Any = None, base: BaseTexts = BASE, **others: Any) -> OwnTexts:
    """Of files as objects; a file is what its argument is called."""
    names = {"map": "special_tokens_map.json", "added": "added_tokens.json"}
    files = {} if config is None else {"tokenizer_config.json": json.dumps(config).encode()}
    for name, content in others.items():
        if name == "jinja":
            files["chat_template.jinja"] = content.encode()
        else:
            files[names[name]] = json.dumps(content).encode()
    return read_own_texts(files, base)


def test_an_adapter_that_ships_nothing_has_nothing() -> None:
    assert read() == NOTHING
    assert read({"model_max_length": 12, "tokenizer_class": "X", "padding_side": "left"}) == NOTHING


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"chat_template": TEMPLATE}},
        {"config": {}, "jinja": TEMPLATE},
        {"jinja": TEMPLATE},
        {"config": {"chat_template": "another"}, "jinja": TEMPLATE},
        {
            "config": {
                "chat_template": [
                    {"name": "tool_use", "template": "x"},
                    {"name": "default", "template": TEMPLATE},
                ]
            }
        },
    ],
)
def test_its_template_is_found_where_transformers_writes_it(files: dict[str, Any]) -> None:
    assert read(**files).template == TEMPLATE


def test_the_templates_variables_are_the_adapters_where_it_names_them() -> None:
    own = read({"chat_template": TEMPLATE, "bos_token": {"content": "<|end|>"}, "pad_token": None})
    assert own.special_tokens == {"bos_token": "<|end|>", "eos_token": "</s>"}, "null is none"
    mapped = read({"chat_template": TEMPLATE}, map={"bos_token": {"content": "<|end|>"}})
    assert mapped.special_tokens == {**own.special_tokens, "pad_token": "[PAD]"}
    assert read({"bos_token": "<|end|>"}).special_tokens == {}, "the base model's template has its"


def test_its_eos_ends_its_replies_if_it_is_not_the_base_models() -> None:
    assert read({"eos_token": "<|end|>"}).eos == 3
    assert read({}, map={"eos_token": {"content": "<|end|>"}}).eos == 3
    assert read({"eos_token": "</s>"}).eos is None
    assert read({}).eos is None


AGREES: list[dict[str, Any]] = [
    {"config": {"pad_token": "[PAD]"}},  # as the base model's own file has it
    {"config": {"pad_token": "</s>", "additional_special_tokens": ["<|end|>", {"content": "<s>"}]}},
    {"config": {"extra_special_tokens": {"image_token": "<|end|>"}}},
    {"config": {"added_tokens_decoder": {"1": {"content": "<s>"}, "9": {"content": "<odd>"}}}},
    {"config": {"add_bos_token": True, "add_eos_token": False}},  # what the tokenizer does
    {"config": {"add_bos_token": False, "add_eos_token": None}},  # what the file says
    {"added": {"</s>": 2, "cat": 4}},
    {"added": {}, "map": {}},
]


@pytest.mark.parametrize("files", AGREES)
def test_what_the_base_model_says_or_does_agrees(files: dict[str, Any]) -> None:
    assert read(**files) == NOTHING


DISAGREES: list[tuple[dict[str, Any], str]] = [
    ({"added": {"<pad>": 10}}, "added_tokens.json adds the token '<pad>'"),
    ({"added": {"cat": 5}}, "added_tokens.json gives the token 'cat' the id 5, and 4 is the base"),
    (
        {"config": {"added_tokens_decoder": {"3": {"content": "cat"}}}},
        "tokenizer_config.json gives the token 'cat' the id 3, and 4",
    ),
    (
        {"config": {"added_tokens_decoder": {"10": {"content": "<new>"}}}},
        "tokenizer_config.json adds the token '<new>'",
    ),
    ({"config": {"pad_token": "<pad>"}}, "name '<pad>' as `pad_token`, which is no special token"),
    ({"map": {"eos_token": {"content": "cat"}}}, "name 'cat' as `eos_token`"),
    ({"config": {"additional_special_tokens": ["<tool>"]}}, "'<tool>' as `additional_special_t"),
    ({"config": {"add_eos_token": True}}, "says True for `add_eos_token`, and the base model's"),
]


@pytest.mark.parametrize(("files", "words"), DISAGREES)
def test_what_says_something_else_is_refused_and_named(files: dict[str, Any], words: str) -> None:
    own = read(**files)
    assert words in own.problem
    assert own.problem.endswith("take its tokenizer files away to have it served with that")
    assert not own.template


MALFORMED: list[tuple[dict[str, bytes], str]] = [
    ({"tokenizer_config.json": b"<html>"}, "its tokenizer_config.json is not a JSON object"),
    ({"tokenizer_config.json": b"[1]"}, "its tokenizer_config.json is not a JSON object"),
    ({"tokenizer_config.json": b'{"a": ' * 5000}, "its tokenizer_config.json is not a JSON object"),
    ({"added_tokens.json": b"\xff"}, "its added_tokens.json is not a JSON object"),
    ({"chat_template.jinja": b"\xff"}, "its chat_template.jinja is not text in UTF-8"),
    ({"tokenizer_config.json": b'{"chat_template": 7}'}, "`chat_template` that is none"),
    ({"tokenizer_config.json": b'{"chat_template": [{"name": 1}]}'}, "`chat_template` that is n"),
    ({"tokenizer_config.json": b'{"chat_template": [1]}'}, "`chat_template` that is none"),
    ({"tokenizer_config.json": b'{"added_tokens_decoder": [1]}'}, "`added_tokens_decoder`"),
    ({"tokenizer_config.json": b'{"added_tokens_decoder": {"x": 1}}'}, "`added_tokens_decoder`"),
    ({"tokenizer_config.json": b'{"added_tokens_decoder": {"1": {}}}'}, "adds the token"),
]


@pytest.mark.parametrize(("files", "words"), MALFORMED)
def test_what_is_no_such_file_is_refused(files: dict[str, bytes], words: str) -> None:
    assert words in read_own_texts(files, BASE).problem


def test_copies_of_the_base_models_own_files_agree_whatever_they_say() -> None:
    base = msgspec.structs.replace(BASE, id_of={}.get, special=(), around=((), (1,)))
    assert read(dict(BASE.config), base) == NOTHING
