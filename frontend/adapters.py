"""Which adapter a request means, what its source is to be shown, and which adapters are known."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from frontend.parameters import ParameterError
from pipeline.adapter_roots import MAX_ID_CHARACTERS, find_local
from pipeline.messages import AdapterKey

SOURCES = ("local", "hub")
MAX_TOKEN_CHARACTERS = 4096
MAX_USED = 4096  # adapters that UsedAdapters remembers
SCOPE_BYTES = 16

# What people write where the openai client wants an api_key and they have none; in lower case.
PLACEHOLDERS = frozenset({"empty", "none", "null", "dummy", "unused", "not-needed", "no-key"})
FOREIGN_KEY = "sk-"  # keys of OpenAI's service begin so; no source of adapters is to see them


class UnknownSource(ParameterError):
    """Adapters do not come from there."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__(
            "adapter_source", f"Invalid source '{source}' when downloading adapter '{name}'"
        )


class Wanted(msgspec.Struct, frozen=True):
    """An adapter, and the secret that its source may want to see."""

    key: AdapterKey
    token: str | None


class AdapterNames:
    """Turns the names that clients use into keys.

    base_model      the id that means the base model, as "" does
    default_source  local, hub, or auto: local if a root holds it, else hub
    roots           folders that hold the adapters of source local
    """

    def __init__(self, *, base_model: str, default_source: str, roots: Sequence[Path]) -> None:
        self._base_model = base_model
        self._default_source = default_source
        self._roots = roots

    def find(
        self, name: str | None, *, source: str | None, token: str | None, parameter: str
    ) -> Wanted | None:
        """What `name` means; None is the base model. Raises ParameterError.

        token      as from `source_token`
        parameter  what the route calls the name
        """
        if not name or name == self._base_model:
            return None
        if len(name) > MAX_ID_CHARACTERS or not name.isprintable():
            raise ParameterError(
                parameter,
                f"`{parameter}` must be printable and have at most {MAX_ID_CHARACTERS} characters",
            )
        source = source or self._source_of(name)
        if source not in SOURCES:
            raise UnknownSource(source, name)
        if source == "local":
            return Wanted(AdapterKey("local", name), None)
        repository, at, revision = name.partition("@")
        if not repository or (at and not revision):
            raise ParameterError(parameter, f"`{parameter}` must be an id, or id@revision")
        return Wanted(AdapterKey("hub", repository, revision, scope_of(token)), token)

    def _source_of(self, name: str) -> str:
        if self._default_source != "auto":
            return self._default_source
        return "local" if find_local(self._roots, name) is not None else "hub"


def source_token(given: str | None, authorization: str | None) -> str | None:
    """The secret for the adapter's source: `api_token`, or the bearer token if that is one.

    Raises ParameterError for what could not be sent in a header.
    """
    token = given or _bearer(authorization)
    if token is None:
        return None
    if len(token) > MAX_TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()):
        raise ParameterError(
            "api_token", f"the token is not printable ASCII of {MAX_TOKEN_CHARACTERS} characters"
        )
    return token


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or token.lower() in PLACEHOLDERS:
        return None
    return None if token.startswith(FOREIGN_KEY) else token


def scope_of(token: str | None) -> str:
    """A digest that tells tenants apart and does not tell the token; empty without one."""
    return hashlib.sha256(token.encode()).hexdigest()[: 2 * SCOPE_BYTES] if token else ""


class UsedAdapters:
    """The adapters that have answered a request, the latest MAX_USED of them."""

    def __init__(self) -> None:
        self._used: OrderedDict[AdapterKey, None] = OrderedDict()

    def add(self, key: AdapterKey) -> None:
        self._used[key] = None
        self._used.move_to_end(key)
        if len(self._used) > MAX_USED:
            self._used.popitem(last=False)

    def names(self, scope: str) -> list[str]:
        """What a client with this scope may know of: what needs no token, and its own."""
        return sorted(
            f"{key.id}@{key.revision}" if key.revision else key.id
            for key in self._used
            if key.scope in ("", scope)
        )
