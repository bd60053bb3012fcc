"""The OpenAPI document: each route, and what it takes as the structs say that decode it. Pure.

A field that is taken only with a value that asks for nothing has these values in its schema.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from frontend import administration, embeddings, lorax, openai, reply_schemas, tokenization

JSON, STREAM, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
SCHEMAS = "#/components/schemas/"
EVENTS = {
    "type": "object",
    "description": "each server-sent event, if a stream is asked for",
    "properties": {"data": {"type": "string", "description": "JSON, or `[DONE]` on /v1/*"}},
    "required": ["data"],
}
ADAPTER_TOKEN = {
    "name": "X-Adapter-Token",
    "in": "header",
    "description": "what the adapter's source wants to see",
    "schema": {"type": "string"},
}
_IN_PATH = re.compile(r"{(\w+)}")
NO_BODY: dict[str, Any] = {}


class Operation(msgspec.Struct, frozen=True):
    """A route. What is in braces in its path is a parameter.

    body      the struct that its body is decoded as
    replies   what 200 has: media type -> type
    error     type of what anything else has
    """

    method: str
    path: str
    tag: str
    summary: str
    body: Any = None
    replies: Mapping[str, Any] = NO_BODY
    error: Any = reply_schemas.LoraxError


def _openai(method: str, path: str, summary: str, body: Any, reply: Any) -> Operation:
    media = {JSON: reply, STREAM: str} if method == "post" else {JSON: reply}
    return Operation(method, path, "OpenAI", summary, body, media, reply_schemas.OpenAIError)


def _admin(path: str, summary: str, body: Any, media: Mapping[str, Any], error: Any) -> Operation:
    return Operation("post", path, "Adapters", summary, body, media, error)


OPERATIONS = (
    _openai(
        "post",
        "/v1/chat/completions",
        "Reply to a chat",
        openai.ChatRequest,
        reply_schemas.ChatCompletion,
    ),
    _openai(
        "post",
        "/v1/completions",
        "Continue a prompt",
        openai.CompletionRequest,
        reply_schemas.Completion,
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "OpenAI",
        "Embed texts",
        embeddings.EmbeddingRequest,
        {JSON: reply_schemas.EmbeddingList},
        reply_schemas.OpenAIError,
    ),
    _openai("get", "/v1/models", "The base model and adapters", None, reply_schemas.Models),
    _openai("get", "/v1/models/{model}", "One of them", None, reply_schemas.Model),
    Operation(
        "post",
        "/generate",
        "LoRAX",
        "Continue a prompt",
        lorax.Request,
        {JSON: reply_schemas.Generated},
    ),
    Operation(
        "post",
        "/generate_stream",
        "LoRAX",
        "Continue a prompt, token by token; errors are events too",
        lorax.Request,
        {STREAM: str},
    ),
    Operation(
        "post",
        "/",
        "LoRAX",
        "Either, as `stream` says; a reply in one piece is the one element of a list",
        lorax.Request,
        {JSON: list[reply_schemas.Generated], STREAM: str},
    ),
    Operation(
        "post",
        "/invocations",
        "LoRAX",
        "As `/`, where SageMaker looks for it",
        lorax.Request,
        {JSON: list[reply_schemas.Generated], STREAM: str},
    ),
    Operation(
        "post",
        "/embed",
        "LoRAX",
        "Embed a text",
        embeddings.EmbedRequest,
        {JSON: reply_schemas.LoraxEmbedding},
    ),
    Operation(
        "post",
        "/pipeline/feature-extraction",
        "LoRAX",
        "Embed texts, as Hugging Face's clients ask for it",
        embeddings.FeatureExtractionRequest,
        {JSON: list[list[float]]},
    ),
    Operation("post", "/classify", "LoRAX", "Refused: no model here has a classification head"),
    Operation("post", "/classify_batch", "LoRAX", "Refused, as `/classify`"),
    Operation(
        "post",
        "/tokenize",
        "LoRAX",
        "The tokens of a text",
        tokenization.Inputs,
        {JSON: list[reply_schemas.TextToken]},
    ),
    Operation("get", "/info", "LoRAX", "Facts of this server", None, {JSON: dict[str, Any]}),
    _admin(
        "/v1/load_lora_adapter",
        "Load an adapter and name it, as vLLM",
        administration.VllmLoad,
        {TEXT: str},
        reply_schemas.OpenAIError,
    ),
    _admin(
        "/v1/unload_lora_adapter",
        "Unload a named adapter, as vLLM",
        administration.Unload,
        {TEXT: str},
        reply_schemas.OpenAIError,
    ),
    _admin(
        "/load_lora_adapter",
        "Load an adapter and name it, as SGLang",
        administration.SglangLoad,
        {JSON: reply_schemas.SglangDone},
        reply_schemas.SglangDone,
    ),
    _admin(
        "/unload_lora_adapter",
        "Unload a named adapter, as SGLang",
        administration.Unload,
        {JSON: reply_schemas.SglangDone},
        reply_schemas.SglangDone,
    ),
    _admin(
        "/v1/adapters/pin",
        "Keep an adapter on the device",
        administration.Pin,
        {JSON: reply_schemas.Done},
        reply_schemas.OpenAIError,
    ),
    _admin(
        "/v1/adapters/unpin",
        "Let an adapter go again",
        administration.Pin,
        {JSON: reply_schemas.Done},
        reply_schemas.OpenAIError,
    ),
    Operation(
        "get",
        "/v1/adapters",
        "Adapters",
        "Adapters that were loaded, and where they lie",
        None,
        {JSON: reply_schemas.KnownAdapters},
        reply_schemas.OpenAIError,
    ),
    Operation("get", "/", "Operations", "Whether a request would be let in"),
    Operation("get", "/health", "Operations", "Whether a request would be let in"),
    Operation("get", "/ping", "Operations", "As `/health`, where SageMaker looks for it"),
    Operation("get", "/startup", "Operations", "Whether a token comes of a prompt"),
    Operation("get", "/metrics", "Operations", "Metrics of all processes", None, {TEXT: str}),
    Operation("get", "/docs", "Operations", "This document for people", None, {HTML: str}),
    Operation("get", "/openapi.json", "Operations", "This document", None, {JSON: dict[str, Any]}),
    Operation(
        "get",
        "/api-doc/openapi.json",
        "Operations",
        "The same, where LoRAX has it",
        None,
        {JSON: dict[str, Any]},
    ),
)
# struct -> field -> the values that ask for nothing; null does as well
NEUTRAL: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "ChatRequest": openai.NOT_IMPLEMENTED,
    "CompletionRequest": openai.NOT_IMPLEMENTED,
    "ChatMessage": openai.EMPTY_IN_MESSAGE,
    "FeatureExtractionRequest": embeddings.NOT_IMPLEMENTED,
}


def document(*, version: str, keys_are_needed: bool, open_paths: Iterable[str]) -> dict[str, Any]:
    """The document of a server.

    open_paths   those that are read without a key
    """
    types = {
        id(one): one
        for operation in OPERATIONS
        for one in (operation.body, operation.error, *operation.replies.values())
        if one is not None
    }
    schemas, components = msgspec.json.schema_components(
        types.values(), ref_template=SCHEMAS + "{name}"
    )
    schema_of = dict(zip(types, schemas, strict=True))
    for name, neutral in NEUTRAL.items():
        _narrow(components[name]["properties"], neutral)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        is_open = operation.method == "get" and operation.path in open_paths
        described = _described(operation, schema_of)
        if keys_are_needed and not is_open:
            described["security"] = [{"key": []}]
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Loradex",
            "version": version,
            "description": "One base model and its LoRA adapters. An adapter is named by `model` "
            "on the routes of OpenAI, and by `adapter_id` on those of LoRAX.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation, schema_of: Mapping[int, Any]) -> dict[str, Any]:
    content = {
        media: {"schema": EVENTS if media == STREAM else schema_of[id(reply)]}
        for media, reply in operation.replies.items()
    }
    done: dict[str, Any] = {"description": "Done"}
    if content:
        done["content"] = content
    described: dict[str, Any] = {
        "operationId": f"{operation.method} {operation.path}",
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {
            "200": done,
            "default": {
                "description": "Why not",
                "content": {JSON: {"schema": schema_of[id(operation.error)]}},
            },
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schema_of[id(operation.body)]}},
        }
    parameters = [_in_path(name) for name in _IN_PATH.findall(operation.path)]
    if operation.body is not None:
        parameters.append(ADAPTER_TOKEN)
    if parameters:
        described["parameters"] = parameters
    return described


def _in_path(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "description": "", "schema": schema}


def _narrow(fields: dict[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Say of fields that would take anything which values they are taken with."""
    for name in neutral.keys() & fields.keys():
        if not fields[name].keys() - {"default"}:
            values = [None, *neutral[name]]
            fields[name] = {"enum": values, "description": "not supported", "default": None}
