"""What a reply says and calls, however its text is cut into pieces."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer_workers.tool_calls import Said, ToolCallParser
from tokenizer_workers.tool_formats import ASSUMED, FORMATS, format_of

NAMES = ("add", "now")
Read = tuple[str, list[tuple[str, str]]]  # text, and name and arguments of each call


class Reader:
    """Puts together what a parser gives, and checks the order of its parts."""

    def __init__(self, form: str, **given: Any) -> None:
        self.parser = ToolCallParser(FORMATS[form], names=NAMES, **given)
        self.text = ""
        self.calls: list[tuple[str, str]] = []

    def take(self, said: Said) -> None:
        self.text += said.text
        for part in said.parts:
            if part.name:
                assert part.index == len(self.calls), "calls come one after the other"
                assert not part.arguments
                self.calls.append((part.name, ""))
            else:
                assert part.index == len(self.calls) - 1
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + part.arguments)


def read(form: str, text: str, cuts: tuple[int, ...] = (), **given: Any) -> Read:
    reader = Reader(form, **given)
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        if not reader.parser.is_over:
            reader.take(reader.parser.push(text[start:end]))
    if not reader.parser.is_over:
        reader.take(reader.parser.finish())
    return reader.text, reader.calls


ONE = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}{\\""}]}}'
ARGUMENTS = '{"a": 1, "b": [2, {"c": "}{\\""}]}'
TWO = '{"name": "now", "arguments": {}}'
# form, reply, what it says, what it calls
REPLIES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("add", ARGUMENTS)]),
    (
        "hermes",
        f"Let me see.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}\n</tool_call>\n",
        "Let me see.\n",
        [("add", ARGUMENTS), ("now", "{}")],
    ),
    ("hermes", 'a <tool_call>\n{"name": "add"}\n</tool_call> b', "a b", [("add", "{}")]),
    ("hermes", "no call: <tool_call> at all", "no call: <tool_call> at all", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a', "", [("add", '{"a')]),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    ("hermes", "1 < 2, <tool_", "1 < 2, <tool_", []),
    ("hermes", "  indented", "  indented", []),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "id": "x", "name": "add"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (
        "llama",
        '{"type": "function", "name": "add", "parameters": {}}; {"name": "now", "parameters": {}}',
        "",
        [("add", "{}"), ("now", "{}")],
    ),
    ("llama", '<|python_tag|>{"name": "x", "parameters": {}}', "", [("x", "{}")]),
    ("llama", '{"answer": {"name": "add"}}', '{"answer": {"name": "add"}}', []),
    ("llama", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama", 'It is {"name": "add"}', 'It is {"name": "add"}', []),
    ("mistral", f"[TOOL_CALLS][{ONE}, {TWO}]", "", [("add", ARGUMENTS), ("now", "{}")]),
    ("mistral", f"[TOOL_CALLS] [{TWO}] done", "done", [("now", "{}")]),
    ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
]


@pytest.mark.parametrize(("form", "reply", "text", "calls"), REPLIES)
def test_a_reply_is_read_as_text_and_calls(
    form: str, reply: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, reply) == (text, calls)


@given(st.sampled_from(REPLIES), st.lists(st.integers(min_value=0), max_size=12))
def test_it_does_not_matter_how_the_text_is_cut(
    case: tuple[str, str, str, list[tuple[str, str]]], cuts: list[int]
) -> None:
    form, reply, text, calls = case
    assert read(form, reply, tuple(cuts)) == (text, calls)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(min_value=0), max_size=12),
    st.booleans(),
)
def test_any_arguments_come_out_as_they_went_in(
    form: str, given_arguments: list[dict[str, Any]], cuts: list[int], ascii_only: bool
) -> None:
    how = FORMATS[form]
    calls = [
        json.dumps({"name": "add", how.arguments[0]: one}, ensure_ascii=ascii_only)
        for one in given_arguments
    ]
    if how.is_list:
        reply = f"{how.begin}[{how.between.join(calls)}]"
    elif how.end:
        reply = how.between.join(f"{how.begin}\n{call}\n{how.end}" for call in calls)
    else:
        reply = how.between.join(calls)
    text, found = read(form, reply, tuple(cuts))
    assert text == ""
    assert [json.loads(arguments) for _, arguments in found] == given_arguments


@given(st.sampled_from(sorted(FORMATS)), st.text(), st.lists(st.integers(min_value=0), max_size=8))
def test_text_without_calls_is_text(form: str, reply: str, cuts: list[int]) -> None:
    if FORMATS[form].begin not in reply and not reply.lstrip().startswith("{"):
        assert read(form, reply, tuple(cuts)) == (reply, [])


def test_arguments_are_given_as_they_come() -> None:
    reader = Reader("hermes")
    seen = []
    for piece in (
        "<tool_call>{",
        '"name": "add", ',
        '"arguments": {"a"',
        ": 1",
        "}}",
        "</tool_call>",
    ):
        reader.take(reader.parser.push(piece))
        seen.append(list(reader.calls))
    assert seen == [
        [],
        [("add", "")],
        [("add", '{"a"')],
        [("add", '{"a": 1')],
        [("add", '{"a": 1}')],
        [("add", '{"a": 1}')],
    ]


def test_of_calls_that_may_not_be_parallel_the_first_ends_the_reply() -> None:
    reader = Reader("hermes", parallel=False)
    reader.take(reader.parser.push(f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"))
    assert reader.parser.is_over
    assert reader.calls == [("add", ARGUMENTS)]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>\\n' }}", "hermes"),
        ("[TOOL_CALLS] {{ x }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama"),
        ("""{{ '{"name": "' }}", "parameters": {% if role == "ipython" %}""", "llama"),
        ("{{ messages }}", ASSUMED),
        (None, ASSUMED),
    ],
)
def test_the_template_tells_how_a_model_calls(template: str | None, form: str) -> None:
    assert format_of(template) == form
