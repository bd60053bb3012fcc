"""The parameters that both families of routes know, under whatever name."""

import re
import secrets
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from pipeline.errors import RequestError
from pipeline.messages import FailureKind

SEED_BITS = 63  # of a seed that we choose: it fits a signed integer of any client
MAX_SEED = (1 << 64) - 1
MAX_DEPTH = 100  # of what a client may nest in a field of any shape

T = TypeVar("T")


class ParameterError(RequestError):
    """A parameter cannot be honoured. `parameter` is its name or a path to it, if it has one.

    status  where it is told: LoRAX has one for all
    """

    def __init__(self, parameter: str | None, message: str, status: int = 400) -> None:
        super().__init__(status, FailureKind.VALIDATION, message)
        self.parameter = parameter


class MalformedJson(Exception):
    """A body is not JSON at all, as opposed to JSON of a wrong shape."""


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Raises MalformedJson, and ParameterError for what has another type than it should."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        raise ParameterError(_path_in(message), message) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(f"The body is not JSON: {error}") from error
    except RecursionError as error:
        raise MalformedJson("The body is not JSON that we read: it is nested too deeply") from error


def _path_in(message: str) -> str | None:
    """What msgspec complains of: it names a field that is missing or unknown, else a path."""
    _, _, path = message.partition(" - at `$")
    field = re.search(r"field `([^`]*)`", message)
    path = path.rstrip("`").lstrip(".")
    if field is None:
        return path or None
    return f"{path}.{field[1]}" if path else field[1]


def random_seed() -> int:
    return secrets.randbits(SEED_BITS)


def stop_strings(stop: str | list[str] | None, limit: int) -> tuple[str, ...]:
    """Raises ParameterError; the sentence about the limit is LoRAX's."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > limit:
        raise ParameterError(
            "stop", f"`stop` supports up to {limit} stop sequences. Given: {len(strings)}"
        )
    if not all(strings):
        raise ParameterError("stop", "`stop` strings cannot be empty")
    return strings


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether an option that is not implemented was given a value that asks for nothing."""
    return value is None or any(value == one and type(value) is type(one) for one in neutral)


def check_travels(name: str, value: object) -> None:
    """JSON has greater integers than a message, and it may be nested so deeply that one of those
    who read it later could not. Raises ParameterError."""
    level: list[object] = [value] if value else []
    for _ in range(MAX_DEPTH):
        if not level:
            break
        level = [inner for outer in level for inner in _inside(outer)]
    else:
        raise ParameterError(name, f"`{name}` is nested more than {MAX_DEPTH} deep")
    try:
        msgspec.msgpack.encode(value)
    except OverflowError as error:
        raise ParameterError(name, f"`{name}` has an integer of more than 64 bits") from error


def _inside(value: object) -> Iterable[object]:
    match value:
        case dict():
            return value.values()
        case list():
            return value
        case _:
            return ()
