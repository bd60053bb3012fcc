"""The exceptions that cross module borders, and what each of them means to whom.

ConfigError            the operator's: the process prints one sentence and exits with 2
RequestError           the client's: carries the status and the kind of its answer
anything else          ours: it ends the process, and the supervisor acts

A RequestError becomes a `messages.Failure` when it has to travel.
"""


class ConfigError(Exception):
    """A setting, or the machine, that the operator must change; the text names the key."""


class RequestError(Exception):
    """A request, or an adapter, that cannot be served.

    status   the HTTP status of the answer
    kind     one of the words in `messages.FailureKind`
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
