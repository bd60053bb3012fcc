"""Routes that administer adapters: those of vLLM and SGLang, and our own.

The Authorization header is the administrator's key here, or the server's where it has none, and
goes to no source of adapters; a private adapter needs `api_token` in the body or X-Adapter-Token.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from frontend import metrics
from frontend.adapters import AdapterNames
from frontend.administration_replies import OurReplies, Replies, SglangReplies, VllmReplies
from frontend.aliases import Aliases
from frontend.authorization import ServerKeys, adapter_token
from frontend.commands import Commands
from frontend.exchange import ClientGone, HttpReply, Unreadable, read_json
from frontend.parameters import MalformedJson, ParameterError, decode
from frontend.processes import Processes
from pipeline.config import Settings
from pipeline.errors import RequestError
from pipeline.messages import AdapterDescription, AdminCommand, AdminVerb, FailureKind

B = TypeVar("B", bound="_Body")

log = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode


class _Body(msgspec.Struct, kw_only=True):
    """Fields that are not here are ignored: controllers send what their server knows."""

    api_token: str | None = None  # not theirs: what the adapter's source wants to see


class VllmLoad(_Body, kw_only=True):
    """POST /v1/load_lora_adapter"""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class SglangLoad(_Body, kw_only=True):
    """POST /load_lora_adapter"""

    lora_name: str = ""
    lora_path: str = ""
    pinned: bool | None = None


class Unload(_Body, kw_only=True):
    """POST /v1/unload_lora_adapter and /unload_lora_adapter; vLLM ignores lora_int_id too."""

    lora_name: str = ""


class Pin(_Body, kw_only=True):
    """POST /v1/adapters/pin, /v1/adapters/unpin"""

    id: str
    adapter_source: str | None = None


class Order(msgspec.Struct, frozen=True):
    """A command, and what is said when it is done."""

    command: AdminCommand
    sentence: str


class _Route(msgspec.Struct, Generic[B], frozen=True):
    path: str
    body: type[B]
    understand: Callable[[B], Order]
    replies: Callable[[], Replies]


class Administration:
    """The endpoints of one frontend.

    names  what clients may call an adapter
    paths  the same without aliases: what an alias may mean
    """

    def __init__(
        self,
        settings: Settings,
        *,
        names: AdapterNames,
        paths: AdapterNames,
        aliases: Aliases,
        keys: ServerKeys,
        commands: Commands,
        processes: Processes,
    ) -> None:
        self._settings = settings
        self._names = names
        self._paths = paths
        self._aliases = aliases
        self._keys = keys
        self._commands = commands
        self._processes = processes

    def routes(self) -> list[Route]:
        def sglang() -> Replies:
            return SglangReplies(self._aliases.all())

        return [
            self._route(_Route("/v1/load_lora_adapter", VllmLoad, self._vllm_load, VllmReplies)),
            self._route(_Route("/v1/unload_lora_adapter", Unload, self._unload, VllmReplies)),
            self._route(_Route("/load_lora_adapter", SglangLoad, self._sglang_load, sglang)),
            self._route(_Route("/unload_lora_adapter", Unload, self._unload, sglang)),
            self._route(_Route("/v1/adapters/pin", Pin, self._pin, OurReplies)),
            self._route(_Route("/v1/adapters/unpin", Pin, self._unpin, OurReplies)),
            Route("/v1/adapters", self.adapters),
        ]

    async def adapters(self, request: Request) -> HttpReply:
        """All adapters that are known; those that were read with a token for administrators."""
        listed = await self._commands.list()
        if not self._keys.is_administrator(request.scope):
            listed = tuple(one for one in listed if not one.adapter.scope)
        return HttpReply(
            200, encode({"object": "list", "data": [self._described(one) for one in listed]})
        )

    async def preload(self) -> None:
        """Load and pin what the settings say; what cannot be is logged."""
        await asyncio.gather(*map(self._preload, self._settings.preload_adapter))

    async def _preload(self, name: str) -> None:
        try:
            await self._commands.do(self._pin(Pin(id=name)).command)
        except RequestError as error:
            log.error("event=preload_failed adapter=%a reason=%a", name, error.message)
        else:
            log.info("event=preloaded adapter=%a", name)

    def _route(self, route: _Route[B]) -> Route:
        decoder = msgspec.json.Decoder(route.body)

        async def endpoint(request: Request) -> HttpReply:
            try:
                reply = await self._answer(request, route, decoder)
            except ClientGone:  # before the body was read; nobody reads this
                reply = HttpReply(499, b"")
            metrics.REQUESTS.labels(route.path, reply.status).inc()
            return reply

        return Route(route.path, endpoint, methods=["POST"])

    async def _answer(
        self, request: Request, route: _Route[B], decoder: msgspec.json.Decoder[B]
    ) -> HttpReply:
        """Raises ClientGone."""
        name = ""
        try:
            self._check_admin(request)
            body = await self._read(request)
            understood = decode(decoder, body)
            understood.api_token = understood.api_token or adapter_token(request.scope)
            order = route.understand(understood)
            name = order.command.name
            await self._commands.do(order.command)
        except MalformedJson as error:
            return route.replies().refused(_error(400, str(error)), name)
        except RequestError as error:
            return route.replies().refused(error, name)
        command = order.command
        subject = name or (command.adapter.id if command.adapter else "")
        log.info("event=administered verb=%s adapter=%a", command.verb.value, subject)
        return route.replies().done(order.sentence)

    def _check_admin(self, request: Request) -> None:
        """Raises RequestError."""
        if not self._settings.allow_adapter_admin:
            raise _error(
                403, "Adapters are not administered over HTTP here (allow_adapter_admin is off)"
            )
        if not self._keys.is_administrator(request.scope):
            raise _error(401, "The administrator's key is missing or wrong")
        missing = self._processes.missing()
        if missing:
            raise _error(503, f"The server is starting; not ready yet: {', '.join(missing)}")

    async def _read(self, request: Request) -> bytes:
        """Raises RequestError and ClientGone."""
        limit = self._settings.max_body_bytes
        try:
            return await read_json(request.scope, request.receive, limit)
        except Unreadable as error:
            raise _error(error.status, error.sentence) from error

    # --- what is asked for ---

    def _vllm_load(self, body: VllmLoad) -> Order:
        return self._load(body, body.lora_name, body.lora_path, in_place=body.load_inplace)

    def _sglang_load(self, body: SglangLoad) -> Order:
        return self._load(body, body.lora_name, body.lora_path, pinned=bool(body.pinned))

    def _load(
        self,
        body: _Body,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        in_place: bool = False,
    ) -> Order:
        if not name or not path:
            raise ParameterError("lora_name", "Both 'lora_name' and 'lora_path' must be provided.")
        if self._paths.find(name, source="local", token=None, parameter="lora_name") is None:
            raise ParameterError("lora_name", f"'{name}' is the base model")
        wanted = self._paths.find(path, source=None, token=body.api_token, parameter="lora_path")
        if wanted is None:
            raise ParameterError("lora_path", f"'{path}' is the base model, not an adapter")
        command = AdminCommand(
            0,
            0,
            AdminVerb.LOAD,
            name=name,
            adapter=wanted.key,
            adapter_token=wanted.token,
            pinned=pinned,
            in_place=in_place,
        )
        return Order(command, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: Unload) -> Order:
        name = body.lora_name
        if not name:
            raise ParameterError(
                "lora_name", "'lora_name' needs to be provided to unload a LoRA adapter."
            )
        command = AdminCommand(0, 0, AdminVerb.UNLOAD, name=name)
        return Order(command, f"Success: LoRA adapter '{name}' removed successfully.")

    def _pin(self, body: Pin) -> Order:
        return self._keep(body, AdminVerb.PIN, "pinned")

    def _unpin(self, body: Pin) -> Order:
        return self._keep(body, AdminVerb.UNPIN, "not pinned any more")

    def _keep(self, body: Pin, verb: AdminVerb, outcome: str) -> Order:
        wanted = self._names.find(
            body.id, source=body.adapter_source, token=body.api_token, parameter="id"
        )
        if wanted is None:
            raise ParameterError("id", "`id` is the base model, not an adapter")
        command = AdminCommand(0, 0, verb, adapter=wanted.key, adapter_token=wanted.token)
        return Order(command, f"Adapter {body.id} is {outcome}")

    def _described(self, one: AdapterDescription) -> dict[str, Any]:
        key = one.adapter
        return {
            "source": key.source,
            "id": key.id,
            "revision": key.revision or None,
            "private": bool(key.scope),
            "names": sorted(name for name, named in self._aliases.all().items() if named == key),
            "rank": one.rank,
            "bytes": one.nbytes,
            "tier": one.tier,
            "pinned": one.pinned,
            "pins": one.pins,
            "running": one.running,
            "waiting": one.waiting,
            "loads": one.loads,
            "idle_seconds": round(one.idle_seconds, 3),
        }


def _error(status: int, message: str) -> RequestError:
    return RequestError(status, FailureKind.VALIDATION, message)
