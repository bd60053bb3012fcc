"""What the worker counts, for /metrics."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from pipeline.metrics import REGISTRY

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Figures:
    """The metrics of one worker; only it changes them."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.step_seconds = Histogram(
            "loradex_step_seconds",
            "Time of one step on the device",
            buckets=BUCKETS,
            registry=registry,
        )
        self.decode_busy_seconds = Counter(
            "loradex_decode_busy_seconds",
            "Time of the device in steps that only decode",
            registry=registry,
        )
        self.decode_idle_seconds = Counter(
            "loradex_decode_idle_seconds",
            "Time of the device between two such steps of which the later was wanted already",
            registry=registry,
        )
        self.fed_tokens = Counter(
            "loradex_fed_tokens",
            "Tokens that went through the model",
            ["phase"],
            registry=registry,
        )
        self.decode_tokens = self.fed_tokens.labels("decode")
        self.prefill_tokens = self.fed_tokens.labels("prefill")
        self.sampled_tokens = Counter(
            "loradex_sampled_tokens", "Tokens that were produced", registry=registry
        )
        self.copied_bytes = Counter(
            "loradex_adapter_copied_bytes", "Bytes of adapters copied in", registry=registry
        )
        self.moved_bytes = Counter(
            "loradex_adapter_moved_bytes",
            "Bytes of adapters moved to make room for others",
            registry=registry,
        )
        self.copies = Counter("loradex_adapter_copies", "Adapters copied in", registry=registry)
