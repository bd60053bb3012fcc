"""What the frontend counts. Labels are bounded: routes, statuses, kinds, the adapters used most."""

from prometheus_client import Counter, Gauge, Histogram

from pipeline.metrics import REGISTRY

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ADAPTER_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)  # few: once for each adapter

REQUESTS = Counter(
    "loradex_http_requests",
    "Requests, by the status that the client was sent; 499: it had gone before",
    ("route", "status"),
    registry=REGISTRY,
)
FAILURES = Counter(
    "loradex_request_failures",
    "Accepted requests that failed, in a stream too",
    ("kind",),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "loradex_requests_in_flight", "Requests accepted and not answered in full", registry=REGISTRY
)
FIRST_TOKEN_SECONDS = Histogram(
    "loradex_first_token_seconds",
    "From a request's arrival to the first text of its stream",
    ("route",),
    buckets=SECONDS,
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "loradex_request_seconds",
    "From a request's arrival to the end of its reply",
    ("route",),
    buckets=SECONDS,
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter(
    "loradex_prompt_tokens", "Tokens of the prompts that were answered", registry=REGISTRY
)
GENERATED_TOKENS = Counter(
    "loradex_generated_tokens", "Tokens of the replies that ended well", registry=REGISTRY
)
ADAPTER_REQUESTS = Counter(
    "loradex_adapter_requests",
    "Requests that have ended, by adapter; the outcome is `answered` or `failed`",
    ("adapter", "outcome"),
    registry=REGISTRY,
)
ADAPTER_TOKENS = Counter(
    "loradex_adapter_tokens",
    "Tokens of requests that were answered, by adapter; the kind is `prompt` or `generated`",
    ("adapter", "kind"),
    registry=REGISTRY,
)
ADAPTER_FIRST_TOKEN_SECONDS = Histogram(
    "loradex_adapter_first_token_seconds",
    "From a request's arrival to its first token, by adapter",
    ("adapter",),
    buckets=ADAPTER_SECONDS,
    registry=REGISTRY,
)
