"""What follows a JSON schema is valid under it: all of the public test suite, and usual schemas.

The suite is that of json-schema-org, as jsonschema's source distribution carries it: the schemas of
drafts 2020-12, 2019-09 and 7. What the library does not support is refused, by its name.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
from llguidance import LLTokenizer

from pipeline.grammars import GrammarError, compile_grammar, source_of
from pipeline.messages import Grammar, GrammarKind
from tests.pipeline.usual_schemas import USUAL
from tests.pipeline.walks import RandomModel

SUITE = Path(__file__).parent / "json_schema_test_suite" / "schemas.jsonl"
REPLIES = 2  # to each schema
VALIDATORS: dict[str, Any] = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
}
URIS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
# what a refusal names: a keyword, a format, a reference elsewhere, or what cannot be
NAMES = re.compile(
    r"Unimplemented keys: \[|Unknown format: |oneOf|Resource '|patternProperty|multipleOf|"
    r"Unsatisfiable schema|is not a JSON schema|Expected .* for '|\$ref|pattern|items|"
    r"object schema|references"
)


class Case(NamedTuple):
    draft: str
    keyword: str
    schema: Any


def cases() -> list[Case]:
    suite = [json.loads(line) for line in SUITE.read_text().splitlines()]
    listed = [Case(one["draft"], one["keyword"], _of_draft(**one)) for one in suite]
    return listed + [Case("draft2020-12", name, schema) for name, schema in USUAL.items()]


def _of_draft(draft: str, schema: Any, **_: str) -> Any:
    return {"$schema": URIS[draft], **schema} if isinstance(schema, dict) else schema


def test_all_that_follows_a_schema_is_valid_and_what_is_not_supported_is_refused_by_name(
    vocabulary: LLTokenizer,
) -> None:
    model = RandomModel(vocabulary, seed=5)
    followed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    unnamed, invalid, unended = [], [], []
    for case in cases():
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(case.schema))
        try:
            matcher = compile_grammar(vocabulary, source_of(grammar))
        except GrammarError as error:
            refused[case.keyword] += 1
            if not NAMES.search(str(error)):
                unnamed.append((case, str(error)))
            continue
        followed[case.keyword] += 1
        validator = VALIDATORS[case.draft]
        checker = validator(case.schema, format_checker=validator.FORMAT_CHECKER)
        for _ in range(REPLIES):
            text, is_whole = model.reply(matcher.deep_copy())
            if not is_whole:
                unended.append((case, text))
            elif not checker.is_valid(json.loads(text)):
                invalid.append((case, text))
    print(f"{followed.total()} schemas followed, {refused.total()} refused: {dict(refused)}")
    assert not invalid
    assert not unended
    assert not unnamed
    assert followed.total() >= 200
    assert not [name for name in USUAL if not followed[name]]


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, '"if", "then"'),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"oneOf": [{"minimum": 3}, {"multipleOf": 2}]}, "oneOf"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"$ref": "http://example.com/schema"}, "http://example.com/schema"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ],
)
def test_a_keyword_that_cannot_be_enforced_is_named(
    vocabulary: LLTokenizer, schema: Any, name: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(name)):
        compile_grammar(vocabulary, source_of(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))))
