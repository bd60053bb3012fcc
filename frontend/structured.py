"""Structured output: what clients write for a grammar, of whatever server they know, as one."""

from typing import Any, Literal

import msgspec

from frontend.parameters import ParameterError
from pipeline.messages import Grammar, GrammarKind

ANY_OBJECT = {"type": "object"}
LORAX_TYPES = {"Text": "text", "JsonObject": "json_object", "JsonSchema": "json_schema"}


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's. A schema is always strict here: what cannot be enforced is refused."""

    schema: dict[str, Any] | None = None
    name: str | None = None  # ignored, as the next two
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's, LoRAX's (`schema`), TGI's (`value`), and more types of grammars."""

    type: Literal[
        "text",
        "json_object",
        "json_schema",
        "json",
        "regex",
        "choice",
        "grammar",
        "Text",
        "JsonObject",
        "JsonSchema",
    ]
    schema: Any = None
    json_schema: JsonSchema | None = None
    value: Any = None

    def grammar(self, name: str) -> Grammar | None:
        """`name` is the parameter's. Raises ParameterError."""
        kind = LORAX_TYPES.get(self.type, self.type)
        schema = self.schema if self.json_schema is None else self.json_schema.schema
        given = schema if self.value is None else self.value
        if sum(one is not None for one in (self.schema, self.json_schema, self.value)) > 1:
            raise ParameterError(name, f"`{name}` says twice what the grammar is")
        match kind:
            case "text":
                if given is not None:
                    raise ParameterError(name, f"`{name}` of type `text` takes no schema")
                return None
            case "json_object":
                return json_schema(ANY_OBJECT if given is None else given, name)
            case "json_schema" | "json":
                if given is None:
                    raise ParameterError(name, f"`{name}` of type `{kind}` needs a schema")
                return json_schema(given, name)
        if given is None:
            raise ParameterError(name, f"`{name}` of type `{kind}` needs a `value`")
        return _choice(given, name) if kind == "choice" else _text(GrammarKind(kind), given, name)


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's."""

    json: Any = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Guided(msgspec.Struct, frozen=True):
    """vLLM's older parameters."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def one_grammar(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    guided: Guided,
    *,
    name: str = "response_format",
) -> Grammar | None:
    """The one grammar of a request, if it has one. Raises ParameterError."""
    found = [] if response_format is None else [response_format.grammar(name)]
    if structured_outputs is not None:
        found += _fields(structured_outputs, "structured_outputs.")
        if structured_outputs.json_object:
            found.append(json_schema(ANY_OBJECT, "structured_outputs.json_object"))
    found += _fields(guided, "guided_")
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        raise ParameterError(name, "a request can have one grammar only; it has several")
    return grammars[0] if grammars else None


def _fields(given: StructuredOutputs | Guided, prefix: str) -> list[Grammar | None]:
    found: list[Grammar | None] = []
    if given.json is not None:
        found.append(json_schema(given.json, prefix + "json"))
    if given.regex is not None:
        found.append(_text(GrammarKind.REGEX, given.regex, prefix + "regex"))
    if given.choice is not None:
        found.append(_choice(given.choice, prefix + "choice"))
    if given.grammar is not None:
        found.append(_text(GrammarKind.LARK, given.grammar, prefix + "grammar"))
    return found


def json_schema(schema: Any, name: str) -> Grammar:
    """A schema may be written as an object, or as a text of one. Raises ParameterError."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except msgspec.DecodeError as error:
            raise ParameterError(name, f"`{name}` is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ParameterError(name, f"`{name}` is not a JSON schema: an object is")
    return Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(schema).decode())


def _text(kind: GrammarKind, value: Any, name: str) -> Grammar:
    if not isinstance(value, str) or not value:
        raise ParameterError(name, f"`{name}` needs a text that is not empty")
    return Grammar(kind, value)


def _choice(values: Any, name: str) -> Grammar:
    if not isinstance(values, list) or not values or not all(_is_text(one) for one in values):
        raise ParameterError(name, f"`{name}` needs a list of texts that are not empty")
    return Grammar(GrammarKind.CHOICE, msgspec.json.encode(values).decode())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
