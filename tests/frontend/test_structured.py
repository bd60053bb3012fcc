"""Whatever a client writes for a grammar becomes the one grammar of its prompt."""

import json
from typing import Any

import pytest

from pipeline.messages import Grammar, GrammarKind
from tests.frontend.fakes import call_of, json_of, refusal_of
from tests.frontend.test_lorax import ROUTES as LORAX
from tests.frontend.test_openai import chat_prompt, completion_prompt, error_of_chat

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')
OF_SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA, separators=(",", ":")))
REGEX = Grammar(GrammarKind.REGEX, "[ab]+")
CHOICE = Grammar(GrammarKind.CHOICE, '["a","b c"]')
LARK = Grammar(GrammarKind.LARK, 'root ::= "a"')

FORMATS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"type": "text"}, None),
    ({"type": "json_object"}, OBJECT),
    ({"type": "json_object", "schema": SCHEMA}, OF_SCHEMA),
    ({"type": "json_schema", "schema": SCHEMA}, OF_SCHEMA),
    ({"type": "JsonSchema", "schema": SCHEMA}, OF_SCHEMA),
    ({"type": "json", "value": SCHEMA}, OF_SCHEMA),
    ({"type": "json", "value": json.dumps(SCHEMA)}, OF_SCHEMA),
    ({"type": "regex", "value": "[ab]+"}, REGEX),
    ({"type": "choice", "value": ["a", "b c"]}, CHOICE),
    ({"type": "grammar", "value": 'root ::= "a"'}, LARK),
]


def lorax_grammar(**parameters: Any) -> Grammar | None:
    body = json.dumps({"inputs": "Hi", "parameters": parameters}).encode()
    return call_of(LORAX.generate(body, None)).prompt.grammar


@pytest.mark.parametrize(("given", "grammar"), FORMATS)
def test_a_response_format_means_the_same_on_all_routes(
    given: dict[str, Any], grammar: Grammar | None
) -> None:
    assert chat_prompt(response_format=given).grammar == grammar
    assert completion_prompt(response_format=given).grammar == grammar
    assert lorax_grammar(response_format=given) == grammar
    assert lorax_grammar(grammar=given) == grammar


def test_openais_schema_is_honoured_with_all_that_comes_with_it() -> None:
    given = {"name": "x", "schema": SCHEMA, "strict": True, "description": "d"}
    prompt = chat_prompt(response_format={"type": "json_schema", "json_schema": given})
    assert prompt.grammar == OF_SCHEMA


def test_what_loraxs_newer_client_sends_without_a_schema_is_any_object() -> None:
    assert lorax_grammar(response_format={"type": "json_object", "schema": None}) == OBJECT


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"guided_json": SCHEMA}, OF_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
        ({"guided_regex": "[ab]+"}, REGEX),
        ({"guided_choice": ["a", "b c"]}, CHOICE),
        ({"guided_grammar": 'root ::= "a"', "guided_decoding_backend": "xgrammar"}, LARK),
        ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, OBJECT),
        ({"structured_outputs": {"regex": "[ab]+"}}, REGEX),
        ({"structured_outputs": {"choice": ["a", "b c"]}}, CHOICE),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, LARK),
        ({"structured_outputs": {"regex": None}}, None),
    ],
)
def test_vllms_names_are_known(given: dict[str, Any], grammar: Grammar | None) -> None:
    assert chat_prompt(**given).grammar == grammar
    assert completion_prompt(**given).grammar == grammar


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json", "schema": {}, "value": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "schema": [1]}}, "response_format"),
        ({"response_format": {"type": "regex", "value": ""}}, "response_format"),
        ({"response_format": {"type": "choice", "value": []}}, "response_format"),
        ({"response_format": {"type": "choice", "value": ["a", ""]}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "response_format"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "response_format"),
    ],
)
def test_what_makes_no_grammar_is_refused_by_name(
    given: dict[str, Any], parameter: str | None
) -> None:
    error = error_of_chat(**given)
    assert error["param"] == (parameter or "response_format")


def test_lorax_routes_refuse_in_their_own_words() -> None:
    body = {"inputs": "Hi", "parameters": {"grammar": {"type": "regex", "value": 5}}}
    refusal = refusal_of(LORAX.generate(json.dumps(body).encode(), None))
    assert refusal.status == 422
    assert json_of(refusal)["error_type"] == "validation"
    both = {"grammar": {"type": "json_object"}, "response_format": {"type": "json_object"}}
    body = {"inputs": "Hi", "parameters": both}
    assert refusal_of(LORAX.generate(json.dumps(body).encode(), None)).status == 422


def test_the_order_of_a_schemas_properties_stays() -> None:
    text = chat_prompt(guided_json=SCHEMA).grammar
    assert text is not None
    assert text.text.index('"b"') < text.text.index('"a"')
