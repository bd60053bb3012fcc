"""The grammar of a reply that calls tools, as Lark."""

import json
from collections.abc import Callable
from typing import Any

from pipeline.grammars import JSON_OPTIONS, lark_string
from pipeline.messages import Grammar, GrammarKind, ToolChoice, Tools
from tokenizer_workers.tool_formats import ToolFormat

ANY_OBJECT = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    form: ToolFormat,
    tools: Tools,
    *,
    content: Grammar | None,
    token_id: Callable[[str], int | None],
) -> Grammar | None:
    """What the reply must match; None if it may be anything.

    A choice of `auto` has one if a tool is strict, or if what is no call has to match `content`, a
    JSON schema. A tool that is not strict may then be called with any object.

    token_id  of a text that is one token which no other text contains, as special ones are
    """
    is_forced = tools.choice is ToolChoice.REQUIRED
    strict = [bool(function.get("strict")) for function in tools.functions]
    if tools.choice is ToolChoice.NONE or not (is_forced or any(strict) or content):
        return content
    called = [f for f in tools.functions if not tools.only or f["name"] == tools.only]
    rules = [_call(form, at, function, is_forced) for at, function in enumerate(called)]
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(called))))
    rules += _calls(form, tools.parallel, token_id)
    rules.append(_start(form, is_forced, content, token_id))
    return Grammar(GrammarKind.LARK, "\n".join(rules))


def _call(form: ToolFormat, at: int, function: dict[str, Any], is_forced: bool) -> str:
    """The JSON object of a call. Each schema is a document of its own, so that its references
    hold."""
    schema = function.get("parameters", NO_ARGUMENTS)
    if not (is_forced or function.get("strict")):
        schema = ANY_OBJECT
    name = json.dumps(function["name"])
    head = f'{{"name": {name}, "{form.arguments[0]}": '
    return f'call_{at}: {lark_string(head)} %json {_json(schema)} "}}"'


def _json(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _calls(form: ToolFormat, parallel: bool, token_id: Callable[[str], int | None]) -> list[str]:
    """Rules for `calls`, and for `rest`: the same behind a `begin` that is read already."""
    between = lark_string(form.between)
    more = f"({between} {{}})*" if parallel else ""
    begin = _marker(form.begin, token_id)
    if form.is_list:
        body = f'"[" call {more.format("call")} "]"'
        return [f"calls: {begin} {body}", f"rest: {body}"]
    if form.end:
        end = f'"\\n" {_marker(form.end, token_id)}'
        rest = f'"\\n" call {end}'
        again = more.format(f"{begin} {rest}")
        return [f"calls: {begin} {rest} {again}", f"rest: {rest} {again}"]
    body = f"call {more.format('call')}"
    return [f"calls: {body}", f"rest: {body}"]


def _marker(text: str, token_id: Callable[[str], int | None]) -> str:
    found = token_id(text)
    return lark_string(text) if found is None else f"<[{found}]>"


def _start(
    form: ToolFormat,
    is_forced: bool,
    content: Grammar | None,
    token_id: Callable[[str], int | None],
) -> str:
    if is_forced:
        return "start: calls"
    if content is not None:
        return f"start: content | calls\ncontent: %json {_json(json.loads(content.text))}"
    if form.is_bare:  # what looks like a call is one
        return "start: | calls | TEXT\nTEXT: /[^{](?s:.*)/"
    found = token_id(form.begin)
    if found is None:
        head = f"head[lazy]: /(?s:.*)/ {lark_string(form.begin)}"
        return f"start: TEXT | head rest\n{head}\nTEXT: /(?s:.*)/"
    return f"start: TEXT | TEXT? <[{found}]> rest\nTEXT: /(?s:.*)/"
