"""The document of the API as a page for people: no script, nothing from elsewhere. Pure."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1 small { color: #666; font-weight: normal } h2 { margin-top: 2rem }
details { border: 1px solid #ddd; border-radius: 4px; margin: .4rem 0; padding: .4rem .8rem }
summary { cursor: pointer } code, pre { font: 13px/1.5 ui-monospace, monospace }
summary code { font-weight: 600 } table { border-collapse: collapse; width: 100% }
td, th { border-top: 1px solid #eee; padding: .2rem .6rem .2rem 0; text-align: left;
  vertical-align: top } .of { color: #666 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 }
  details, td, th { border-color: #333 } .of, h1 small { color: #999 } a { color: #8ab4f8 } }
"""
# nothing is loaded and nothing runs, whatever a text in the document might hold
POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
REF = "#/components/schemas/"


def page(document: Mapping[str, Any]) -> bytes:
    """HTML."""
    facts, schemas = document["info"], document["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(facts['title'])}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{STYLE}</style>",
        f"<h1>{escape(facts['title'])} <small>{escape(facts['version'])}</small></h1>",
        f"<p>{_text(facts['description'])} <a href=/openapi.json>openapi.json</a></p>",
    ]
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = "".join(_operation(method, path, operation))
            by_tag.setdefault(operation["tags"][0], []).append(shown)
    for tag, operations in by_tag.items():
        parts += [f"<h2>{escape(tag)}</h2>", *operations]
    parts.append("<h2>Types</h2>")
    for name, schema in sorted(schemas.items()):
        parts += _schema(name, schema)
    return "\n".join(parts).encode()


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    key = " 🔑" if operation.get("security") else ""
    yield f"<details><summary><code>{method.upper()} {escape(path)}</code>"
    yield f" {_text(operation['summary'])}{key}</summary><table>"
    if "requestBody" in operation:
        for media, content in operation["requestBody"]["content"].items():
            yield _row("body", media, content["schema"])
    for parameter in operation.get("parameters", ()):
        place, name = escape(parameter["in"]), escape(parameter["name"])
        text = _text(parameter["description"])
        yield f"<tr><td>{place}<td><code>{name}</code><td>{text}"
    for status, reply in operation["responses"].items():
        told = "200" if status == "200" else "else"
        contents = reply.get("content", {"nothing": {"schema": {}}})
        for media, content in contents.items():
            yield _row(told, media, content["schema"])
    yield "</table></details>"


def _row(what: str, media: str, schema: Mapping[str, Any]) -> str:
    return f"<tr><td>{what}<td><code>{escape(media)}</code><td>{_kind(schema)}"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details id='{escape(name)}' open><summary><code>{escape(name)}</code>"
    yield f" <span class=of>{_text(schema.get('description', ''))}</span></summary><table>"
    needed = schema.get("required", ())
    for field, of_field in schema.get("properties", {}).items():
        default = "needed" if field in needed else _default(of_field)
        text = _text(of_field.get("description", ""))
        yield f"<tr><td><code>{escape(field)}</code><td>{_kind(of_field)}<td>{default}<td>{text}"
    if schema.get("additionalProperties") is False:
        yield "<tr><td colspan=4 class=of>other fields are refused"
    yield "</table></details>"


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default is None else f"<code>{escape(json.dumps(default))}</code>"


def _kind(schema: Mapping[str, Any]) -> str:
    """What values a schema takes, in a few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(REF))
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"<code>{escape(json.dumps(one))}</code>" for one in schema["enum"])
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    bounds = [
        f"{sign} {schema[name]}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", "&gt;"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "&lt;"),
        )
        if name in schema
    ]
    return " ".join([kind, *bounds])


def _text(text: str) -> str:
    """Plain text in which `code` is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))
