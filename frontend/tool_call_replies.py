"""Tool calls as OpenAI's replies write them, whole and in a stream."""

import secrets
import string
from collections.abc import Iterable
from typing import Any

from pipeline.messages import Piece, ToolCallPart

ALPHABET = string.ascii_letters + string.digits
ID_CHARACTERS = 9  # as many as Mistral's templates insist on


def new_call_id() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_CHARACTERS))


def whole_calls(pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """`tool_calls` of a message."""
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for piece in pieces for part in piece.tool_calls):
        if part.name:
            calls[part.index] = {
                "id": new_call_id(),
                "type": "function",
                "function": {"name": part.name, "arguments": ""},
            }
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())


def call_delta(part: ToolCallPart) -> dict[str, Any]:
    """A delta that adds to one call; the first of a call names it."""
    if part.name:
        call = {
            "index": part.index,
            "id": new_call_id(),
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
    else:
        call = {"index": part.index, "function": {"arguments": part.arguments}}
    return {"tool_calls": [call]}
