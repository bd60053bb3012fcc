"""The ASGI application: which path is whose, and what becomes of an exchange that goes wrong."""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from frontend import metrics
from frontend.adapter_metrics import AdapterMetrics
from frontend.adapters import AdapterNames, FindAlias, UsedAdapters
from frontend.administration import Administration
from frontend.calls import Call, Dialect
from frontend.commands import Commands
from frontend.downstream import Downstream
from frontend.exchange import HttpReply
from frontend.generate import Generate
from frontend.lorax import Lorax
from frontend.openai import OpenAI
from frontend.operations import Operations
from frontend.processes import Processes
from frontend.startup import Startup
from frontend.tokenization import Tokenization
from pipeline.config import Settings

Handler = Callable[[Request, Exception], Awaitable[Response]]

OTHER_ROUTE = "other"  # the metric label of every path that is none of ours


def make_app(
    settings: Settings,
    index: int,
    *,
    downstream: Downstream,
    processes: Processes,
    administration: Administration,
) -> Starlette:
    """The application of one frontend. It changes nothing that outlives it but metrics."""
    openai, lorax = _dialects(settings, processes, _names(settings, downstream.aliases.find))
    used = UsedAdapters()
    adapter_metrics = AdapterMetrics(settings.adapter_labels)
    operations = Operations(
        settings,
        index,
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
        path: str, dialect: Dialect, understand: Callable[[bytes, str | None], Call | HttpReply]
    ) -> Route:
        endpoint = Generate(
            path,
            understand,
            dialect=dialect,
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
            generate("/", lorax, lorax.compatible),
            generate("/invocations", lorax, lorax.compatible),
            generate("/generate", lorax, lorax.generate),
            generate("/generate_stream", lorax, lorax.generate_stream),
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
        ],
        exception_handlers=_handlers(openai, lorax),
    )
    app.router.redirect_slashes = False
    return app


def make_administration(
    settings: Settings, *, downstream: Downstream, processes: Processes, commands: Commands
) -> Administration:
    return Administration(
        settings,
        names=_names(settings, downstream.aliases.find),
        paths=_names(settings, lambda _name: None),
        aliases=downstream.aliases,
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
    )
    lorax = Lorax(
        base_model=settings.model_id,
        adapters=names,
        max_stop_sequences=settings.max_stop_sequences,
        max_best_of=settings.max_choices,
        compute_type=lambda: _compute_type(processes),
    )
    return openai, lorax


def _compute_type(processes: Processes) -> str:
    """As LoRAX writes what it runs on."""
    device = str(processes.fact("gpu_worker", "device"))
    return f"{'gpu' if device.startswith('cuda') else 'cpu'}+optimized"


def _handlers(openai: Dialect, lorax: Dialect) -> dict[type[Exception], Handler]:
    """What is said of errors that no route told of itself, in the words of the path's family."""

    def dialect_of(request: Request) -> Dialect:
        return openai if request.url.path.startswith("/v1") else lorax

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
