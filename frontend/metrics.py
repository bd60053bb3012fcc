"""What the frontend counts. Labels are bounded: routes, statuses, kinds, the adapters used most."""

from prometheus_client import Counter, Gauge, Histogram

from pipeline.messages import Usage
from pipeline.metrics import REGISTRY

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
TOKEN_TIMES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 2.5)
ADAPTER_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)  # few: once for each adapter

REQUESTS = Counter(
    "loradex_http_requests",
    "Requests, by the status that the client was sent; 499: it had gone before",
    ("route", "status"),
    registry=REGISTRY,
)
REFUSED_CONNECTIONS = Counter(
    "loradex_refused_connections",
    "Connections closed on a request that was too slow (408) or had too large a head (431)",
    ("status",),
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
SLOW_READERS = Counter(
    "loradex_slow_readers",
    "Connections that were cut off since next to nothing was read of them",
    registry=REGISTRY,
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
REPEATED = Counter(
    "loradex_repeated_requests",
    "Prompts sent again, to a tokenizer worker that took the place of one that had died",
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter(
    "loradex_prompt_tokens", "Tokens of the prompts that were answered", registry=REGISTRY
)
GENERATED_TOKENS = Counter(
    "loradex_generated_tokens", "Tokens of the replies that ended well", registry=REGISTRY
)
EMBEDDINGS = Counter(
    "loradex_embeddings", "Texts that were embedded, several of a request too", registry=REGISTRY
)
ENDS = Counter(
    "loradex_request_ends",
    "Accepted requests that have ended, by the reason",
    ("reason",),
    registry=REGISTRY,
)
REQUEST_PROMPT_TOKENS = Histogram(
    "loradex_request_prompt_tokens",
    "Tokens of the prompt of a request that was answered",
    buckets=TOKENS,
    registry=REGISTRY,
)
REQUEST_GENERATED_TOKENS = Histogram(
    "loradex_request_generated_tokens",
    "Tokens of the reply of a request that was answered",
    buckets=TOKENS,
    registry=REGISTRY,
)
TOKEN_SECONDS = Histogram(
    "loradex_token_seconds",
    "Mean time from a token to the next, of a request that was answered",
    buckets=TOKEN_TIMES,
    registry=REGISTRY,
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


def count_embeddings(usage: Usage, *, inputs: int) -> None:
    """A request to embed so many has ended well."""
    _count_prompt(usage.prompt_tokens)
    EMBEDDINGS.inc(inputs)


def count_answer(usage: Usage) -> None:
    """A request has ended well."""
    _count_prompt(usage.prompt_tokens)
    generated = usage.completion_tokens
    GENERATED_TOKENS.inc(generated)
    REQUEST_GENERATED_TOKENS.observe(generated)
    if generated > 1:
        seconds = usage.total_seconds - usage.first_token_seconds
        TOKEN_SECONDS.observe(seconds / (generated - 1))


def _count_prompt(tokens: int) -> None:
    PROMPT_TOKENS.inc(tokens)
    REQUEST_PROMPT_TOKENS.observe(tokens)
