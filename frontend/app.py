"""The ASGI application: which path is whose, and what becomes of an exchange that goes wrong."""

from collections.abc import Awaitable, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from frontend import docs_page, metrics, openapi
from frontend.adapter_metrics import AdapterMetrics
from frontend.adapters import AdapterNames, FindAlias, UsedAdapters
from frontend.administration import Administration
from frontend.authorization import (
    CHALLENGE,
    OPEN,
    SENTENCE,
    Authorization,
    Gate,
    ServerKeys,
)
from frontend.calls import Call, Dialect
from frontend.commands import Commands
from frontend.downstream import Downstream
from frontend.embeddings import AT_ONCE, Embeddings, no_classification
from frontend.exchange import Headers, HttpReply
from frontend.generate import Generate
from frontend.lorax import Lorax
from frontend.openai import OpenAI
from frontend.operations import Operations
from frontend.processes import Processes
from frontend.startup import Startup
from frontend.tokenization import Tokenization
from frontend.tracing import Tracing
from pipeline.config import Settings
from pipeline.messages import PoolingKind

Handler = Callable[[Request, Exception], Awaitable[Response]]

OTHER_ROUTE = "other"  # the metric label of every path that is none of ours


def make_app(
    settings: Settings,
    index: int,
    *,
    downstream: Downstream,
    processes: Processes,
    administration: Administration,
    tracing: Tracing | None = None,
) -> Starlette:
    """The application of one frontend. It changes nothing that outlives it but metrics."""
    names = _names(settings, downstream.aliases.find)
    openai, lorax = _dialects(settings, processes, names)
    embeddings = _embeddings(settings, processes, names)
    keys = ServerKeys(settings)
    used = UsedAdapters()
    adapter_metrics = AdapterMetrics(settings.adapter_labels)
    operations = Operations(
        settings,
        index,
        keys=keys,
        processes=processes,
        admission=downstream.admission,
        used=used,
        aliases=downstream.aliases,
    )
    startup = Startup(downstream=downstream, processes=processes)
    tokenization = Tokenization(
        downstream=downstream, processes=processes, max_body_bytes=settings.max_body_bytes
    )
    metrics.IN_FLIGHT.set_function(lambda: downstream.admission.in_flight)

    def generate(
        path: str, dialect: Dialect, understand: Callable[[bytes, Authorization], Call | HttpReply]
    ) -> Route:
        endpoint = Generate(
            path,
            understand,
            dialect=dialect,
            keys=keys,
            tracing=tracing,
            downstream=downstream,
            processes=processes,
            used=used,
            adapter_metrics=adapter_metrics,
            max_body_bytes=settings.max_body_bytes,
        )
        return Route(path, endpoint, methods=["POST"])

    app = Starlette(
        routes=[
            generate("/v1/chat/completions", openai, openai.chat),
            generate("/v1/completions", openai, openai.completion),
            generate("/v1/embeddings", openai, embeddings.openai),
            generate("/", lorax, lorax.compatible),
            generate("/invocations", lorax, lorax.compatible),
            generate("/generate", lorax, lorax.generate),
            generate("/generate_stream", lorax, lorax.generate_stream),
            generate("/embed", lorax, embeddings.lorax),
            generate("/pipeline/feature-extraction", lorax, embeddings.feature_extraction),
            generate("/classify", lorax, no_classification),
            generate("/classify_batch", lorax, no_classification),
            *administration.routes(),
            Route("/v1/models", operations.models),
            Route("/v1/models/{model:path}", operations.model),
            Route("/", operations.health),
            Route("/health", operations.health),
            Route("/ping", operations.health),
            Route("/startup", startup.endpoint),
            Route("/tokenize", tokenization.endpoint, methods=["POST"]),
            Route("/info", operations.info),
            Route("/metrics", operations.metrics),
            *_document_routes(operations.version, keys),
        ],
        middleware=[_gate(settings, keys, openai, lorax)] if keys.are_needed else [],
        exception_handlers=_handlers(openai, lorax),
    )
    app.router.redirect_slashes = False
    return app


def _document_routes(version: str, keys: ServerKeys) -> list[Route]:
    described = openapi.document(version=version, keys_are_needed=keys.are_needed, open_paths=OPEN)
    policy = (b"content-security-policy", docs_page.POLICY.encode())
    html: Headers = ((b"content-type", b"text/html; charset=utf-8"), policy)
    document = HttpReply(200, msgspec.json.encode(described))
    page = HttpReply(200, docs_page.page(described), html)

    async def show_document(request: Request) -> HttpReply:
        return document

    async def show_page(request: Request) -> HttpReply:
        return page

    return [
        Route("/openapi.json", show_document),
        Route("/api-doc/openapi.json", show_document),
        Route("/docs", show_page),
    ]


def make_administration(
    settings: Settings, *, downstream: Downstream, processes: Processes, commands: Commands
) -> Administration:
    return Administration(
        settings,
        names=_names(settings, downstream.aliases.find),
        paths=_names(settings, lambda _name: None),
        aliases=downstream.aliases,
        keys=ServerKeys(settings),
        commands=commands,
        processes=processes,
    )


def _names(settings: Settings, find_alias: FindAlias) -> AdapterNames:
    return AdapterNames(
        base_model=settings.model_id,
        default_source=settings.default_adapter_source,
        sources=settings.adapter_sources(),
        roots=settings.adapter_roots(),
        find_alias=find_alias,
    )


def _dialects(
    settings: Settings, processes: Processes, names: AdapterNames
) -> tuple[OpenAI, Lorax]:
    openai = OpenAI(
        base_model=settings.model_id,
        adapters=names,
        max_stop_sequences=settings.max_stop_sequences,
        max_choices=settings.max_choices,
        allow_chat_template=settings.allow_chat_template,
    )
    lorax = Lorax(
        base_model=settings.model_id,
        adapters=names,
        max_stop_sequences=settings.max_stop_sequences,
        max_best_of=settings.max_choices,
        compute_type=lambda: _compute_type(processes),
    )
    return openai, lorax


def _embeddings(settings: Settings, processes: Processes, names: AdapterNames) -> Embeddings:
    return Embeddings(
        base_model=settings.model_id,
        adapters=names,
        pooling=PoolingKind(settings.pooling),
        hidden_size=lambda: processes.fact("gpu_worker", "hidden_size"),
        at_once=min(AT_ONCE, settings.max_tenant_waiting or AT_ONCE),
    )


def _compute_type(processes: Processes) -> str:
    """As LoRAX writes what it runs on."""
    device = str(processes.fact("gpu_worker", "device"))
    return f"{'gpu' if device.startswith('cuda') else 'cpu'}+optimized"


def _gate(settings: Settings, keys: ServerKeys, openai: Dialect, lorax: Dialect) -> Middleware:
    def refuse(path: str) -> HttpReply:
        metrics.REQUESTS.labels(OTHER_ROUTE, 401).inc()
        return _dialect_of(path, openai, lorax).http_error(401, SENTENCE, CHALLENGE)

    return Middleware(Gate, keys=keys, protect_metrics=settings.protect_metrics, refuse=refuse)


def _dialect_of(path: str, openai: Dialect, lorax: Dialect) -> Dialect:
    return openai if path.startswith("/v1") else lorax


def _handlers(openai: Dialect, lorax: Dialect) -> dict[type[Exception], Handler]:
    """What is said of errors that no route told of itself, in the words of the path's family."""

    def dialect_of(request: Request) -> Dialect:
        return _dialect_of(request.url.path, openai, lorax)

    async def http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        metrics.REQUESTS.labels(OTHER_ROUTE, error.status_code).inc()
        sentence = f"{error.detail}: {request.method} {request.url.path}"
        reply = dialect_of(request).http_error(error.status_code, sentence)
        return _response(reply, dict(error.headers or {}))

    async def our_error(request: Request, error: Exception) -> Response:
        """It is raised again after this, and logged by the server."""
        metrics.REQUESTS.labels(OTHER_ROUTE, 500).inc()
        return _response(dialect_of(request).http_error(500, "Something went wrong here"), {})

    return {HTTPException: http_exception, Exception: our_error}


def _response(reply: HttpReply, headers: dict[str, str]) -> Response:
    ours = {str(name, "latin-1"): str(value, "latin-1") for name, value in reply.headers}
    return Response(reply.body, reply.status, {**ours, **headers})
