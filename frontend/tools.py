"""Tools of a chat: what OpenAI's clients write, and what of it is honoured."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from frontend.parameters import ParameterError, check_travels
from frontend.structured import json_schema
from pipeline.messages import ToolChoice, Tools

MAX_TOOLS = 128
FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(msgspec.Struct, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; none: no arguments
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class FunctionOfCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str = ""  # JSON
    parsed_arguments: Any = None  # ignored: OpenAI's client adds it to what it has parsed


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """Of an earlier reply."""

    id: str
    function: FunctionOfCall
    type: Literal["function"] = "function"
    index: int | None = None  # ignored: it comes from streams

    def plain(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class _Named(msgspec.Struct):
    name: str


class _Choice(msgspec.Struct):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: _Named


def read_tools(
    tools: list[Tool] | None, choice: Any, *, parallel: bool | None, prompt: str | None
) -> Tools | None:
    """None when there are none. Raises ParameterError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ParameterError("tool_choice", "`tool_choice` is allowed with `tools` only")
        return None
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise ParameterError("tools", f"`tools` has at most {MAX_TOOLS} tools. Given: {len(tools)}")
    if len(set(names)) != len(names):
        raise ParameterError("tools", "two of `tools` have the same name")
    kind, only = _choice(choice, names)
    return Tools(
        functions=[_plain(tool.function) for tool in tools],
        choice=kind,
        only=only,
        parallel=parallel is not False and not only,
        prompt=prompt or "",
    )


def _plain(function: Function) -> dict[str, Any]:
    if function.parameters is not None:
        check_travels("tools", function.parameters)
        json_schema(function.parameters, "tools")
    plain = msgspec.to_builtins(function)
    return {name: value for name, value in plain.items() if value is not None}


def _choice(choice: Any, names: list[str]) -> tuple[ToolChoice, str]:
    """A text that is no kind of choice is a tool's name, as LoRAX has it."""
    if choice is None:
        return ToolChoice.AUTO, ""
    if choice in list(ToolChoice):
        return ToolChoice(choice), ""
    if isinstance(choice, str):
        name = choice
    else:
        try:
            name = msgspec.convert(choice, _Choice).function.name
        except msgspec.ValidationError as error:
            sentence = '`tool_choice` is none, auto, required or {"type": "function", ...}'
            raise ParameterError("tool_choice", f"{sentence}: {error}") from error
    if name not in names:
        raise ParameterError("tool_choice", f"`tool_choice`: there is no tool {name}")
    return ToolChoice.REQUIRED, name
