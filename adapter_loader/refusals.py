"""Why an adapter cannot be had, as errors for the client.

Their text is one sentence without the adapter's id, which `failure` puts in front. It names files
and tensors, but no path of the server and no token.
"""

from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, Failure, FailureKind

MAX_SHOWN = 200  # characters of somebody else's text in a sentence


def not_found(reason: str) -> RequestError:
    return RequestError(404, FailureKind.ADAPTER_NOT_FOUND, reason)


def forbidden(reason: str) -> RequestError:
    return RequestError(403, FailureKind.ADAPTER_FORBIDDEN, reason)


def invalid(reason: str) -> RequestError:
    return RequestError(422, FailureKind.ADAPTER_INVALID, reason)


def unavailable(reason: str) -> RequestError:
    return RequestError(503, FailureKind.ADAPTER_UNAVAILABLE, reason)


def failure(key: AdapterKey, error: RequestError) -> Failure:
    """The error as it travels, with the adapter's id in front."""
    return Failure(error.status, FailureKind(error.kind), f"adapter {key.id}: {error.message}")


def shown(value: object) -> str:
    """Somebody else's text or value, printable and not too long."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
