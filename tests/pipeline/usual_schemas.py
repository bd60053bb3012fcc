"""Schemas as clients of language models send them."""

from typing import Any

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


USUAL: dict[str, Any] = {
    "person": PERSON,
    "people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3},
    "any object": {"type": "object"},
    "optional": {**PERSON, "required": ["name"]},
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "a union": of(value={"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}),
    "nullable": of(value={"type": ["string", "null"]}),
    "enum": of(label={"enum": ["positive", "negative", "neutral"]}),
    "mixed enum": of(value={"enum": [1, "one", None, True, [1], {"a": 2}]}),
    "const": of(kind={"const": "x"}, version={"const": 3}),
    "nested": of(a=of(b=of(c=of(d={"type": "boolean"})))),
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    "range": of(score={"type": "number", "minimum": -1.5, "maximum": 1.5}),
    "exclusive": of(n={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}),
    "multiple": of(price={"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 99}),
    "lengths": of(code={"type": "string", "minLength": 3, "maxLength": 5}),
    "pattern": of(phone={"type": "string", "pattern": r"^\d{3}-\d{4}$"}),
    "formats": of(
        when={"type": "string", "format": "date-time"},
        day={"type": "string", "format": "date"},
        at={"type": "string", "format": "time"},
        id={"type": "string", "format": "uuid"},
        mail={"type": "string", "format": "email"},
        ip={"type": "string", "format": "ipv4"},
    ),
    "refs": {
        "$defs": {"point": of(x={"type": "number"}, y={"type": "number"})},
        **of(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "a tree": {
        "$defs": {
            "node": of(
                value={"type": "integer"},
                children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            )
        },
        "$ref": "#/$defs/node",
    },
    "pydantic": {
        "title": "Reply",
        "type": "object",
        "$defs": {
            "Step": {
                "title": "Step",
                **of(
                    explanation={"title": "Explanation", "type": "string"},
                    output={"title": "Output", "type": "string"},
                ),
            }
        },
        "properties": {
            "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
            "final_answer": {
                "anyOf": [{"type": "string"}, {"type": "null"}],
                "default": None,
                "title": "Final Answer",
            },
        },
        "required": ["steps"],
    },
    "discriminated": {
        "oneOf": [
            of(kind={"const": "cat"}, lives={"type": "integer", "maximum": 9, "minimum": 0}),
            of(kind={"const": "dog"}, tricks={"type": "array", "items": {"type": "string"}}),
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": {"type": "string"}},
        "additionalProperties": False,
    },
    "property counts": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "unicode": of(größe={"type": "integer"}, emoji={"enum": ["😀", "é", "日本"]}),
    "escapes": of(text={"enum": ['"', "\\", "\n", "\t\u0001", "a/b"]}),
    "a text": {"type": "string", "maxLength": 20},
    "an integer": {"type": "integer"},
    "a boolean": {"type": "boolean"},
    "nothing but null": {"type": "null"},
    "annotated": {
        **of(a={"type": "string", "description": "d", "examples": ["x"], "default": "y"}),
        "title": "T",
        "$comment": "c",
        "description": "all",
    },
}
