"""What decides in frontend, scheduler and loader, wired together; the rest is moved by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from adapter_loader.core import Core, Discard, StartFetch, StartPack
from frontend.adapters import AdapterNames, UsedAdapters
from frontend.authorization import ServerKeys
from frontend.calls import Call
from frontend.exchange import HttpReply
from frontend.lorax import Lorax
from pipeline.adapter_layout import pack_ranks
from pipeline.arena import ALIGNMENT
from pipeline.config import SOURCES, Settings
from pipeline.errors import RequestError
from pipeline.messages import (
    AdapterDropped,
    AdapterKey,
    AdapterStaged,
    Failure,
    FinishReason,
    ForgetAdapter,
    Leased,
    LoadAdapter,
    Prefetch,
    ReleaseAdapter,
)
from tests.scheduler.world import World
from tests.tenants.sources import Sources

KEYS = ServerKeys(Settings())  # none: a bearer token is for the adapter's source
BASE = "the/base"
LOAD_SECONDS = 50.0
ARENA_PAGES = 6


class RealLoader:
    """The loader's core over `sources`, which are asked when the test says."""

    def __init__(self, sources: Sources, remember_seconds: float) -> None:
        self.arena: dict[int, str] = {}  # content by offset
        self.fetches: list[StartFetch] = []  # under way
        self._sources = sources
        self._fetched: dict[AdapterKey, str] = {}
        self._core = Core(
            arena_bytes=ARENA_PAGES * ALIGNMENT,
            load_seconds=LOAD_SECONDS,
            remember_seconds=remember_seconds,
        )

    def send(self, message: LoadAdapter | Leased | ReleaseAdapter | ForgetAdapter) -> None:
        match message:
            case LoadAdapter():
                self._core.load(message, self._sources.now)
            case Leased():
                self._core.leased(message)
            case ForgetAdapter():
                self._core.forget(message)
            case ReleaseAdapter():
                assert self._core.release(message)
        self._act()

    def fetch(self, which: int) -> None:
        """A source answers."""
        fetch = self.fetches.pop(which)
        read = self._sources.read(fetch.key, fetch.token)
        if isinstance(read, Failure):
            message = f"adapter {fetch.key.id}: {read.message}"
            failure = msgspec.structs.replace(read, message=message)
            self._core.failed(fetch.key, failure, self._sources.now)
        elif fetch.known == (read[0],):
            self._core.unchanged(fetch.key)
        else:
            self._fetched[fetch.key] = read[1]
            self._core.fetched(fetch.key, (read[0],), ALIGNMENT, pack_ranks([8]))
        self._act()

    def answer(self, world: World) -> None:
        """Tell the scheduler what has come of its loads."""
        self._core.expire(world.now)
        self._act()
        for answer in self._core.take_outbox():
            if isinstance(answer, AdapterStaged):
                world.core.adapter_staged(answer, world.now)
            elif isinstance(answer, AdapterDropped):
                world.core.adapter_dropped(answer, world.now)
            else:
                world.core.adapter_failed(answer, world.now)
            world.settle()

    def _act(self) -> None:
        while actions := self._core.take_actions():
            for action in actions:
                match action:
                    case StartFetch():
                        self.fetches.append(action)
                    case StartPack():
                        content = self._fetched.pop(action.key)
                        self.arena[action.offset] = content
                        self._core.packed(action.key, content)
                    case Discard():
                        del self._fetched[action.key]


class Asked(msgspec.Struct, frozen=True):
    """A request that was understood, as the client sent it."""

    at: float
    tokens: frozenset[str]  # all secrets in it
    parameters: dict[str, Any]
    prompt: tuple[int, ...]
    max_tokens: int
    call: Call


class Node:
    """roots hold the local adapters; times are those of `world.now`."""

    def __init__(
        self,
        sources: Sources,
        roots: Sequence[Path],
        *,
        remember_seconds: float,
        **settings: Any,
    ) -> None:
        names = AdapterNames(
            base_model=BASE, default_source="auto", sources=SOURCES, roots=tuple(roots)
        )
        self._lorax = Lorax(
            base_model=BASE,
            adapters=names,
            max_stop_sequences=4,
            max_best_of=1,
            compute_type=lambda: "cpu",
        )
        self.sources = sources
        self.loader = RealLoader(sources, remember_seconds)
        self.world = World(
            loader=self.loader, adapter_load_seconds=LOAD_SECONDS, max_wait_seconds=1e9, **settings
        )
        self.asked: dict[int, Asked] = {}  # by request id
        self.refused: list[tuple[dict[str, Any], HttpReply]] = []
        self.used = UsedAdapters()
        self._accounted: set[int] = set()

    def submit(
        self,
        parameters: Mapping[str, Any],
        authorization: str | None,
        tokens: frozenset[str],
        prompt: Sequence[int],
        max_tokens: int,
    ) -> int | None:
        """POST /generate. The request's id, or None when it is refused at once."""
        body = {"inputs": "text", "parameters": {"max_new_tokens": max_tokens, **parameters}}
        headers = [(b"authorization", authorization.encode())] if authorization else []
        shown = KEYS.read({"headers": headers})
        call = self._lorax.generate(json.dumps(body).encode(), shown)
        if isinstance(call, HttpReply):
            self.refused.append((dict(parameters), call))
            return None
        key, token, tenant = (
            call.prompt.adapter,
            call.prompt.adapter_token,
            call.prompt.tenant,
        )
        if key is not None:
            self.world.core.prefetch(Prefetch(key, token, tenant), self.world.now)
        request_id = self.world.submit(
            prompt, adapter=key, token=token, tenant=tenant, max_tokens=max_tokens
        )
        self.asked[request_id] = Asked(
            self.world.now, tokens, dict(parameters), tuple(prompt), max_tokens, call
        )
        self.loader.answer(self.world)
        return request_id

    def fetch(self, which: int = 0) -> None:
        self.loader.fetch(which)
        self.loader.answer(self.world)

    def step(self) -> None:
        self.world.step()
        self.loader.answer(self.world)
        self.account()

    def wait(self, seconds: float) -> None:
        self.sources.now = self.world.now + seconds
        self.world.wait(seconds)
        self.loader.answer(self.world)
        self.account()

    def run(self) -> None:
        """Until all have their answer."""
        while self.loader.fetches or self.world.worker.steps or self.world.worker.placing:
            if self.world.worker.steps:
                self.step()
            elif self.world.worker.placing:
                self.world.arrive()
                self.loader.answer(self.world)
            else:
                self.fetch()
        self.account()
        assert self.world.core.idle

    def account(self) -> None:
        """As the frontend does, of what has ended well."""
        for request_id in self.world.finished.keys() - self._accounted:
            self._accounted.add(request_id)
            key = self.asked[request_id].call.prompt.adapter
            if self.world.finished[request_id].reason is not FinishReason.ERROR and key:
                for part in key.parts:
                    self.used.add(part)

    def refusal(self, request_id: int) -> bytes | None:
        """What a client reads whose request has failed."""
        failure = self.world.finished[request_id].failure
        if failure is None:
            return None
        error = RequestError(failure.status, failure.kind, failure.message)
        return self.asked[request_id].call.shape.refusal(error).body
