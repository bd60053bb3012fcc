"""When a client stops waiting, as it says itself: the field `timeout`, or a header. Pure.

Clients' own timeouts close the connection, which cancels the request too; a deadline that the
server knows holds behind proxies that keep connections open, and its end is told.
"""

from typing import Annotated, NamedTuple

from msgspec import Meta
from starlette.types import Scope

from frontend.exchange import header
from frontend.parameters import ParameterError
from pipeline.messages import Failure, FailureKind

HEADER = "X-Request-Timeout"
MAX_SECONDS = 7 * 24 * 3600.0

Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]


class Deadline(NamedTuple):
    """When nobody waits any more."""

    seconds: float  # from the request's arrival, as the client said
    at: float  # of time.monotonic()


def timeout_in(scope: Scope) -> float | None:
    """The seconds that the header says, if it is there. Raises ParameterError."""
    text = header(scope, HEADER.lower().encode())
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ParameterError(
            HEADER, f"`{HEADER}` must be seconds, above 0 and at most {MAX_SECONDS:.0f}"
        )
    return seconds


def deadline_of(arrived: float, timeout: float | None) -> Deadline | None:
    return None if timeout is None else Deadline(timeout, arrived + timeout)


def passed(deadline: Deadline) -> Failure:
    """What a request is told that was not answered in time."""
    sentence = f"The request was not answered in full within its timeout of {deadline.seconds:g} s"
    return Failure(504, FailureKind.DEADLINE, sentence)
