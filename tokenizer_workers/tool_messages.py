"""Tools in the messages of a chat, for templates that know them and for those that do not: pure."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.messages import Tools
from tokenizer_workers.tool_formats import ToolFormat

Message = dict[str, Any]


def tool_objects(tools: Tools) -> list[dict[str, Any]]:
    """As templates take them: OpenAI's, without what only grammars are for."""
    return [
        {"type": "function", "function": {k: v for k, v in one.items() if k != "strict"}}
        for one in tools.functions
    ]


def with_argument_objects(messages: Sequence[Message]) -> list[Message]:
    """The arguments of earlier calls as objects, which templates write as JSON themselves.

    OpenAI's messages have them as a string of JSON; one that is no JSON object stays a string.
    """
    return [_with_objects(message) for message in messages]


def _with_objects(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def explained(
    messages: Sequence[Message], tools: Tools | None, form: ToolFormat, *, system: bool
) -> list[Message]:
    """The chat in words that any template takes: what the tools are stands in the system message,
    calls stand in the assistant's text, and what the tools gave comes from the user.

    system   whether the template takes a system message; else the first message explains
    """
    plain = _plain(messages, form)
    if tools is None or not tools.functions:
        return plain
    text = _explanation(tools, form)
    first = plain[0] if plain else None
    role = "system" if system else "user"
    if first is not None and first["role"] == role:
        return [{**first, "content": _joined(first.get("content"), text, system)}, *plain[1:]]
    return [{"role": role, "content": text}, *plain]


def _joined(content: Any, text: str, system: bool) -> str:
    own = _text(content)
    return f"{own}\n\n{text}" if system else f"{text}\n\n{own}"


def _explanation(tools: Tools, form: ToolFormat) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tool_objects(tools))
    if tools.prompt:
        return f"{tools.prompt}\n{listed}"
    example = {"name": "...", form.arguments[0]: {"...": "..."}}
    return (
        f"You can call these functions, each of which is described by a JSON object:\n{listed}\n\n"
        f"To call one, write its name and its arguments as JSON, and nothing else, like this:\n"
        f"{_written(json.dumps(example), form)}"
    )


def _written(call: str, form: ToolFormat) -> str:
    if form.is_list:
        return f"{form.begin}[{call}]"
    return f"{form.begin}\n{call}\n{form.end}" if form.end else call


def _plain(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    plain: list[Message] = []
    gave = False  # the message before is of a tool
    for message in messages:
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            text = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if gave:
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text})
        elif calls:
            texts = [_text(message.get("content"))] * bool(message.get("content"))
            texts += [_written(_call(call["function"], form), form) for call in calls]
            plain.append({"role": message["role"], "content": "\n".join(texts)})
        else:
            plain.append(message)
        gave = message["role"] == "tool"
    return plain


def _call(function: dict[str, Any], form: ToolFormat) -> str:
    written = {"name": function["name"], form.arguments[0]: function["arguments"]}
    return json.dumps(written, ensure_ascii=False)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""
