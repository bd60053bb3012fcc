"""Grammars of every kind, what bounds them, and what is said of those that cannot be had."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer, models

from pipeline.grammars import (
    MAX_MULTIPLE,
    MAX_SOURCE_BYTES,
    GrammarError,
    compile_grammar,
    load_vocabulary,
    source_of,
)
from pipeline.messages import Grammar, GrammarKind
from pipeline.repetitions import MAX_NESTED, nested, nested_in_lark
from tests.pipeline.walks import RandomModel

KIND = GrammarKind
ARITHMETIC = 'start: term ("+" term){0,3}\nterm: /[0-9]{1,3}/ | "(" term ")"'
GBNF = 'root ::= "say " word\nword ::= [a-c]+ | "it"'


def error_of(vocabulary: LLTokenizer, kind: GrammarKind, text: str) -> str:
    with pytest.raises(GrammarError) as caught:
        compile_grammar(vocabulary, source_of(Grammar(kind, text)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        (KIND.REGEX, r"[0-9]{3}-[0-9]{4}", r"[0-9]{3}-[0-9]{4}"),
        (KIND.REGEX, r"(yes|no)!?", r"(yes|no)!?"),
        (KIND.REGEX, r"\p{Greek}{2,4}", r"[\u0370-\u03ff\u1f00-\u1fff\u2100-\uffff]{2,4}"),
        (
            KIND.CHOICE,
            '["a\\"b\\\\", "😀 é\\n", "plain"]',
            'a"b\\\\\\\\|😀 é\n|plain'.replace("\\\\\\\\", r"\\"),
        ),
        (KIND.LARK, ARITHMETIC, r"[(]*[0-9]{1,3}[)]*([+][(]*[0-9]{1,3}[)]*){0,3}"),
        (KIND.LARK, GBNF, r"say ([a-c]+|it)"),
        (KIND.LARK, 'start: "x" %json {"type": "boolean"}', r"x(true|false)"),
    ],
)
def test_a_reply_matches_its_grammar(
    vocabulary: LLTokenizer, kind: GrammarKind, text: str, pattern: str
) -> None:
    model = RandomModel(vocabulary, seed=1)
    matcher = compile_grammar(vocabulary, source_of(Grammar(kind, text)))
    for _ in range(5):
        reply, is_whole = model.whole_reply(matcher)
        assert is_whole
        assert re.fullmatch(pattern, reply), reply


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        (KIND.REGEX, "(", "unclosed group"),
        (KIND.REGEX, "a(?=b)", "look-around"),
        (KIND.LARK, 'start: "a" b', 'unknown name: "b"'),
        (KIND.LARK, "root ::= (", "cannot be read"),
        (KIND.JSON_SCHEMA, '{"type": "objekt"}', "objekt"),
        (KIND.JSON_SCHEMA, '{"type": "string", "enum": [1]}', "Unsatisfiable"),
        (KIND.JSON_SCHEMA, '{"$ref": "#"}', "no text matches it"),
        (KIND.CHOICE, "[]", "none of them empty"),
        (KIND.REGEX, "a" * (MAX_SOURCE_BYTES + 1), str(MAX_SOURCE_BYTES)),
    ],
)
def test_what_is_wrong_is_said(
    vocabulary: LLTokenizer, kind: GrammarKind, text: str, named: str
) -> None:
    error = error_of(vocabulary, kind, text)
    assert named in error
    assert "<state>" not in error


def deep(levels: int) -> str:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return json.dumps(schema)


HOSTILE = [
    (KIND.REGEX, "((a{1,1000}){1,1000}){1,1000}"),
    (KIND.REGEX, "((a{30,100}){30,100}){30,100}"),
    (KIND.REGEX, "(" * 5000 + "a" + ")" * 5000),
    (KIND.LARK, "A: B{100}\nB: C{100}\nC: /a{100}/\nstart: A"),
    (KIND.LARK, "start: " + "(" * 2000 + '"a"' + ")" * 2000),
    (KIND.JSON_SCHEMA, json.dumps({"type": "integer", "multipleOf": MAX_MULTIPLE + 1})),
    (KIND.JSON_SCHEMA, '{"type": "integer", "multiple\\u004ff": 999983}'),
    (KIND.JSON_SCHEMA, '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'),
    (KIND.JSON_SCHEMA, '{"type": "number", "multipleOf": 1e-300}'),
    (KIND.LARK, 'start: %json {"type": "integer", "multipleOf": 999983}'),
    (KIND.JSON_SCHEMA, json.dumps({"enum": [f"v{n}" for n in range(100_000)]})),
    (KIND.JSON_SCHEMA, json.dumps({"pattern": "((a{30,99}){30,99}){9}", "type": "string"})),
    (KIND.JSON_SCHEMA, deep(500)),
]


@pytest.mark.parametrize(("kind", "text"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_would_take_long_is_refused_at_once(
    vocabulary: LLTokenizer, kind: GrammarKind, text: str
) -> None:
    start = time.thread_time()
    assert error_of(vocabulary, kind, text)
    assert time.thread_time() - start < 1


def test_a_tokenizer_that_the_library_does_not_know_is_the_models_fault(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(GrammarError, match="tokenizer cannot be used with grammars"):
        load_vocabulary(tmp_path, eos_token_ids=(0,), size=2)
    with pytest.raises(GrammarError, match="no token that ends a reply"):
        load_vocabulary(tmp_path, eos_token_ids=(), size=2)


@pytest.mark.parametrize(
    ("pattern", "product"),
    [
        ("abc*", 1),
        ("a{3}", 3),
        ("a{2,}", 2),
        ("(a{30,100}){3,10}", 1000),
        ("([0-9a-f]{1,4}:){7}", 28),
        (r"a\{3\}{4}", 4),
        ("[{5}]{6}", 6),
        ("[]{5}]{6}", 6),
        (r"[\]{5}]{6}", 6),
        ("((a{5}b*)+c){7}", 35),
        ("a{5}|(b{3}){4}", 12),
        ("(a{3}", 3),
    ],
)
def test_repetitions_in_each_other_are_multiplied(pattern: str, product: int) -> None:
    assert nested(pattern) == product


@pytest.mark.parametrize(
    ("grammar", "product"),
    [
        ('start: "a"', 1),
        ("start: b{10000}\nb: /x{7}/", 7),
        ("start: A\nA: B{10}\nB: /x{7}/", 70),
        ('start: A\nA: "x{5}"~3..4', 4),
        ("start: A\nA: (/x{3}/ | /y/){2}\n | /z{9}/", 18),
    ],
)
def test_terminals_of_lark_count_as_if_each_held_the_others(grammar: str, product: int) -> None:
    assert nested_in_lark(grammar) == product


@given(st.text(alphabet="ab(){}[]\\,*?+|1239", max_size=40))
def test_any_text_has_a_number_of_repetitions(pattern: str) -> None:
    assert nested(pattern) >= 1
    assert nested_in_lark(pattern) >= 1


def test_usual_patterns_stay_below_the_bound() -> None:
    for pattern in (
        r"\d{4}-\d{2}-\d{2}",
        r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,4}",
        r"(([0-9a-f]{1,4}:){1,7}|:)([0-9a-f]{1,4})?",
        r".{0,100000}",
    ):
        assert nested(pattern) <= MAX_NESTED or pattern == r".{0,100000}"
