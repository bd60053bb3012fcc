"""What operators and their machines ask for: health, facts, metrics, and the list of models."""

import asyncio
import importlib.metadata
import time
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import Request

from frontend.adapters import UsedAdapters, scope_of, source_token, written
from frontend.admission import Admission
from frontend.aliases import Aliases
from frontend.authorization import ServerKeys
from frontend.exchange import RETRY, HttpReply
from frontend.lorax_replies import unhealthy
from frontend.metric_aliases import with_aliases
from frontend.openai_replies import refusal
from frontend.parameters import ParameterError
from frontend.processes import Processes
from pipeline.adapter_roots import list_local
from pipeline.config import Settings
from pipeline.errors import RequestError
from pipeline.messages import FailureKind
from pipeline.metrics import exposition, snapshot

METRICS_TYPE = ((b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()),)

encode = msgspec.json.Encoder().encode


class Operations:
    """The endpoints."""

    def __init__(
        self,
        settings: Settings,
        index: int,
        *,
        keys: ServerKeys,
        processes: Processes,
        admission: Admission,
        used: UsedAdapters,
        aliases: Aliases,
    ) -> None:
        self._settings = settings
        self._index = index
        self._keys = keys
        self._processes = processes
        self._admission = admission
        self._used = used
        self._aliases = aliases
        self._started = int(time.time())
        self.version = _version()

    async def health(self, request: Request) -> HttpReply:
        """200 when a request would be let in, as far as that is for us to say; else 503."""
        why = self._processes.waits_for()
        if not why and not self._admission.draining:
            return HttpReply(200, b"", ())
        return unhealthy(why or "shutting down", RETRY)

    async def info(self, request: Request) -> HttpReply:
        """LoRAX's facts, null where there is no such thing here, and what each process says."""
        settings, fact = self._settings, self._processes.fact
        total = fact("tokenizer_workers", "max_total_tokens")
        blocks, tokens = fact("scheduler", "kv_blocks"), fact("scheduler", "kv_block_tokens")
        fits = blocks * tokens if isinstance(blocks, int) and isinstance(tokens, int) else None
        return HttpReply(
            200,
            encode(
                {
                    "model_id": settings.model_id,
                    "model_sha": settings.model_revision or None,
                    "model_dtype": fact("gpu_worker", "dtype"),
                    "model_device_type": fact("gpu_worker", "device"),
                    "model_pipeline_tag": "text-generation",
                    "max_concurrent_requests": settings.max_concurrent_requests,
                    "max_best_of": settings.max_choices,
                    "max_stop_sequences": settings.max_stop_sequences,
                    "max_input_length": total - 1 if isinstance(total, int) else None,
                    "max_total_tokens": total,
                    "waiting_served_ratio": None,
                    "max_batch_total_tokens": fits,
                    "max_waiting_tokens": None,
                    "validation_workers": settings.tokenizer_workers,
                    "eager_prefill": None,
                    "version": self.version,
                    "sha": None,
                    "docker_label": None,
                    "request_logger_url": None,
                    "processes": self._processes.facts(),
                }
            ),
        )

    async def metrics(self, request: Request) -> HttpReply:
        """Prometheus' text format: every process as it last reported, this one as it is; each under
        the names of others too."""
        families = self._processes.families()
        families[("frontend", self._index)] = snapshot()
        named = {at: with_aliases(one, self._settings.model_id) for at, one in families.items()}
        return HttpReply(200, exposition(named), METRICS_TYPE)

    async def models(self, request: Request) -> HttpReply:
        """The base model, and the adapters that are known: named ones, local ones, those in use."""
        try:
            token = source_token(None, self._keys.read(request.scope))
        except ParameterError as error:
            return refusal(error)
        roots = self._settings.adapter_roots()
        local = await asyncio.to_thread(lambda: list(list_local(roots)))
        scope = scope_of(token)
        roots_of = {name: name for name in (*local, *self._used.names(scope))}
        for name, key in self._aliases.all().items():
            if key.scope in ("", scope):
                roots_of[name] = written(key)
        base = self._settings.model_id
        adapters = [self._model(name, root, base) for name, root in roots_of.items()]
        models = [self._model(base, base, None), *adapters]
        return HttpReply(200, encode({"object": "list", "data": models}))

    async def model(self, request: Request) -> HttpReply:
        """One of the list; its id may hold slashes."""
        name = request.path_params["model"]
        if not name:
            raise HTTPException(404)
        listed = await self.models(request)
        if listed.status != 200:
            return listed
        for model in msgspec.json.decode(listed.body)["data"]:
            if model["id"] == name:
                return HttpReply(200, encode(model))
        unknown = RequestError(
            404, FailureKind.ADAPTER_NOT_FOUND, f"The model `{name}` is not known here"
        )
        return refusal(unknown)

    def _model(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "loradex",
            "root": root,
            "parent": parent,
        }


def _version() -> str:
    try:
        return importlib.metadata.version("loradex")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0+unknown"
