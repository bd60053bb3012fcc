"""Who may ask at all, what the adapter's source is to be shown, and whose share a request takes.

Two kinds of secrets come in headers. A server key, if the server has any, is shown as Bearer. The
token of an adapter's source is shown as X-Adapter-Token or, as with LoRAX, as Bearer where the
server has no keys. A server key is never sent on to a source.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.exchange import HttpReply, header
from pipeline.config import Settings

# Answered without a key: what tells machines whether the server lives, and what its API is.
OPEN = frozenset(
    {"/", "/health", "/ping", "/startup", "/docs", "/openapi.json", "/api-doc/openapi.json"}
)
READING = frozenset({"GET", "HEAD"})
METRICS = "/metrics"

CHALLENGE = ((b"www-authenticate", b"Bearer"),)
SENTENCE = "A key of this server is needed, as `Authorization: Bearer`; none or another was shown"

# What people write where a client wants an api_key and they have none; in lower case.
PLACEHOLDERS = frozenset(
    {
        "-",
        "api-key",
        "api_key",
        "dummy",
        "empty",
        "fake",
        "key",
        "n/a",
        "na",
        "no-key",
        "no-key-needed",
        "no-key-required",
        "none",
        "not-needed",
        "not-used",
        "null",
        "ollama",
        "placeholder",
        "sk-no-key-required",
        "test",
        "token",
        "undefined",
        "unused",
        "x",
        "xxx",
    }
)
FOREIGN_KEY = "sk-"  # keys of OpenAI's service begin so; no source of adapters is to see them


class Authorization(msgspec.Struct, frozen=True):
    """What a request shows in its headers; None where it shows nothing that means something."""

    bearer: str | None = None  # whatever it is for
    adapter_token: str | None = None  # for the adapter's source

    def __repr__(self) -> str:
        """Both are secrets."""
        return "Authorization(...)"


class ServerKeys:
    """The keys of a server. Its administrator's key opens what the others do as well."""

    def __init__(self, settings: Settings) -> None:
        self._keys = tuple(map(_digest, settings.api_key))
        admin = settings.admin_api_key if settings.allow_adapter_admin else ""
        self._admin = (_digest(admin),) if admin else ()
        self._needs_admin = bool(admin)
        self._allows_admin = settings.allow_adapter_admin

    @property
    def are_needed(self) -> bool:
        """Whether requests have to show one."""
        return bool(self._keys)

    def admit(self, scope: Scope) -> bool:
        """Whether the request shows a key, if one is needed."""
        return not self._keys or _is_one_of(_bearer(scope), self._keys + self._admin)

    def is_administrator(self, scope: Scope) -> bool:
        """Whether it may administer adapters, given that it was admitted."""
        if not self._needs_admin:
            return self._allows_admin
        return _is_one_of(_bearer(scope), self._admin)

    def read(self, scope: Scope) -> Authorization:
        """What an admitted request shows."""
        bearer = _credential(_bearer(scope))
        token = adapter_token(scope)
        if token is None and bearer is not None and not self._keys:
            is_key = bearer.startswith(FOREIGN_KEY) or _is_one_of(bearer, self._admin)
            token = None if is_key else bearer
        return Authorization(bearer, token)


class Gate:
    """The ASGI application that lets those in who show a key.

    refuse  how a path's family of routes says that one is missing
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ServerKeys,
        protect_metrics: bool,
        refuse: Callable[[str], HttpReply],
    ) -> None:
        self._app = app
        self._keys = keys
        self._open = OPEN if protect_metrics else OPEN | {METRICS}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and end of the server
            await self._app(scope, receive, send)
            return
        is_open = scope["path"] in self._open and scope["method"] in READING
        if is_open or self._keys.admit(scope):
            await self._app(scope, receive, send)
        else:
            await self._refuse(scope["path"])(scope, receive, send)


def adapter_token(scope: Scope) -> str | None:
    """What the header of that name shows."""
    return _credential(header(scope, b"x-adapter-token"))


def _bearer(scope: Scope) -> str | None:
    scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _credential(token: str | None) -> str | None:
    """What is more than a placeholder."""
    token = (token or "").strip()
    return token if token and token.lower() not in PLACEHOLDERS else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_one_of(shown: str | None, keys: Iterable[bytes]) -> bool:
    """Takes as long for one that is nearly right as for any other, the first or the last."""
    digest = _digest(shown or "")
    return sum(hmac.compare_digest(digest, key) for key in keys) > 0
