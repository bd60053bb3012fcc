"""Which adapter a request means, what its source is to be shown, and which adapters are known."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from frontend.adapter_ids import http_id, hub_id, local_path, pbase_id, s3_id, source_of_url
from frontend.authorization import Authorization
from frontend.parameters import ParameterError
from pipeline.adapter_roots import MAX_ID_CHARACTERS, find_local, local_id
from pipeline.config import SOURCES
from pipeline.messages import AdapterKey

MAX_TOKEN_CHARACTERS = 4096
MAX_USED = 4096  # adapters that UsedAdapters remembers
SCOPE_BYTES = 16
TOKENLESS = frozenset({"local", "s3"})  # sources that everybody may read

FindAlias = Callable[[str], AdapterKey | None]


# What clients of TGI, which has one model, send as `model` when they were not told any.
STAND_INS = frozenset({"tgi", "dummy"})


class UnknownSource(ParameterError):
    """Adapters do not come from there."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__(
            "adapter_source", f"Invalid source '{source}' when downloading adapter '{name}'"
        )


class SourceOff(ParameterError):
    """Adapters may come from there, at other servers."""

    def __init__(self, source: str) -> None:
        super().__init__("adapter_source", f"Source '{source}' is not turned on at this server")


class Wanted(msgspec.Struct, frozen=True):
    """An adapter, and the secret that its source may want to see."""

    key: AdapterKey
    token: str | None


class AdapterNames:
    """Turns the names that clients use into keys.

    base_model      the id that means the base model, as "" does
    default_source  one of the sources, or auto: what the scheme of a URL says (s3://, https://,
                    http://, pb://), else local if a root holds it, else hub
    sources         those that are on
    roots           folders that hold the adapters of source local
    find_alias      what administrators have named so; it comes first where no source is named
    """

    def __init__(
        self,
        *,
        base_model: str,
        default_source: str,
        sources: Collection[str],
        roots: Sequence[Path],
        find_alias: FindAlias = lambda _name: None,
    ) -> None:
        self._base_model = base_model
        self._sources = sources
        self._default_source = default_source
        self._roots = roots
        self._find_alias = find_alias

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
        alias = None if source else self._find_alias(name)
        if alias is not None:
            return _shown(alias.public, token)
        source = source or self._source_of(name)
        if source not in SOURCES:
            raise UnknownSource(source, name)
        if source not in self._sources:
            raise SourceOff(source)
        if source == "local":
            name = local_id(self._roots, name)
        try:
            return _wanted(source, name, token)
        except ValueError as error:
            raise ParameterError(parameter, f"`{parameter}` {error}") from error

    def is_stand_in(self, name: str) -> bool:
        """Whether a client only has to say something: nothing is called so here."""
        return (
            name in STAND_INS
            and self._find_alias(name) is None
            and find_local(self._roots, name) is None
        )

    def _source_of(self, name: str) -> str:
        said = source_of_url(name)
        if said is not None:
            return said
        if self._default_source != "auto":
            return self._default_source
        return "local" if find_local(self._roots, name) is not None else "hub"


def _wanted(source: str, name: str, token: str | None) -> Wanted:
    """Raises ValueError for what cannot be an id."""
    revision = ""
    match source:
        case "local":
            name = local_path(name)
        case "hub":
            name, revision = hub_id(name)
        case "s3":
            name = s3_id(name)
        case "pbase":
            name = pbase_id(name)
        case "http":
            name = http_id(name)
    return _shown(AdapterKey(source, name, revision), token)


def _shown(key: AdapterKey, token: str | None) -> Wanted:
    """The adapter as this token's tenant sees it. A token goes only where it is of use."""
    if key.source in TOKENLESS:
        return Wanted(key, None)
    return Wanted(msgspec.structs.replace(key, scope=scope_of(token)), token)


def written(key: AdapterKey) -> str:
    """The id as a client would write it."""
    return f"{key.id}@{key.revision}" if key.revision else key.id


def source_token(given: str | None, authorization: Authorization | None) -> str | None:
    """The secret for the adapter's source: `api_token`, or what a header shows for it.

    Raises ParameterError for what could not be sent in a header.
    """
    token = given or (authorization.adapter_token if authorization else None)
    if token is None:
        return None
    if len(token) > MAX_TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()):
        raise ParameterError(
            "api_token", f"the token is not printable ASCII of {MAX_TOKEN_CHARACTERS} characters"
        )
    return token


def tenant_of(given: str | None, authorization: Authorization | None) -> str:
    """Whose share of the server a request takes, as a digest: the bearer token's, whatever it is
    for, or else that of the adapter's source; empty for those who send neither."""
    shown = authorization or Authorization()
    return scope_of(shown.bearer or given or shown.adapter_token)


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
        return sorted(written(key) for key in self._used if key.scope in ("", scope))
