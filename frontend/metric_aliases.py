"""Our metrics under the names of LoRAX and vLLM, for the dashboards and routers that read those.

Nothing is counted here: an alias is made, whenever /metrics is asked for, from what a process has
reported under our own names, and belongs to that process. Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from pipeline.messages import FailureKind, FinishReason
from pipeline.metrics import Families

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
UNTYPED = "unknown"  # LoRAX's counters do not end in _total, as the type demands

Samples = list[tuple[str, dict[str, str], float]]
Labels = Mapping[str, str]


class By(NamedTuple):
    """A label of an alias: ours that it is made of, and other words for its values."""

    ours: str
    words: Mapping[str, str] = {}


class Alias(msgspec.Struct, frozen=True):
    """A metric under another name, summed over all labels that are not in `labels`.

    labels   those of the alias
    leave    (label, value) of our samples that do not count
    """

    name: str
    kind: str
    ours: str
    labels: Mapping[str, By] = {}
    leave: tuple[str, str] | None = None

    def samples(self, ours: Mapping[str, Samples], model: Labels) -> Samples | None:
        given = ours.get(self.ours)
        if given is None:
            return None
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample, labels, value in given:
            if self.leave is not None and labels.get(self.leave[0]) == self.leave[1]:
                continue
            kept = {
                name: by.words.get(labels[by.ours], labels[by.ours])
                for name, by in self.labels.items()
            }
            if "le" in labels:
                kept["le"] = labels["le"]
            at = (self._sample(sample), tuple(kept.items()))
            sums[at] = sums.get(at, 0.0) + value
        return [
            (sample, {**dict(labels), **model}, value) for (sample, labels), value in sums.items()
        ]

    def _sample(self, sample: str) -> str:
        suffix = sample.removeprefix(self.ours)
        return self.name if self.kind == UNTYPED else self.name + suffix


class Computed(msgspec.Struct, frozen=True):
    """A gauge that is computed from several of ours."""

    name: str
    ours: tuple[str, ...]
    compute: Callable[..., float]
    kind: str = GAUGE

    def samples(self, ours: Mapping[str, Samples], model: Labels) -> Samples | None:
        if not all(name in ours for name in self.ours):
            return None
        values = [sum(value for _, _, value in ours[name]) for name in self.ours]
        return [(self.name, dict(model), self.compute(*values))]


class Facts(msgspec.Struct, frozen=True):
    """A gauge that is always 1 and says what some of ours stand at in its labels."""

    name: str
    ours: Mapping[str, str]  # label -> gauge
    kind: str = GAUGE

    def samples(self, ours: Mapping[str, Samples], model: Labels) -> Samples | None:
        if not all(name in ours for name in self.ours.values()):
            return None
        labels = {
            label: str(round(sum(value for _, _, value in ours[name])))
            for label, name in self.ours.items()
        }
        return [(self.name, {**labels, **model}, 1.0)]


# LoRAX's words for what went wrong; it has one for all that comes of an adapter
FAILURES: dict[str, str] = {
    FailureKind.TEMPLATE: "template",
    FailureKind.ADAPTER_NOT_FOUND: "generation",
    FailureKind.ADAPTER_FORBIDDEN: "generation",
    FailureKind.ADAPTER_INVALID: "generation",
    FailureKind.ADAPTER_UNAVAILABLE: "generation",
    FailureKind.TIMEOUT: "dropped",
    FailureKind.DEADLINE: "dropped",
    FailureKind.SHUTDOWN: "dropped",
    FailureKind.INTERNAL: "generation",
}
REASONS: dict[str, str] = {FinishReason.EOS: "stop"}  # vLLM's

LORAX: tuple[Alias | Computed, ...] = (
    Alias("lorax_request_count", UNTYPED, "loradex_request_ends"),
    Alias(
        "lorax_request_success",
        UNTYPED,
        "loradex_request_ends",
        leave=("reason", FinishReason.ERROR),
    ),
    Alias(
        "lorax_request_failure",
        UNTYPED,
        "loradex_request_failures",
        labels={"err": By("kind", FAILURES)},
    ),
    Alias("lorax_request_duration", HISTOGRAM, "loradex_request_seconds"),
    Alias("lorax_request_validation_duration", HISTOGRAM, "loradex_encode_seconds"),
    Alias("lorax_request_queue_duration", HISTOGRAM, "loradex_queue_seconds"),
    Alias("lorax_request_inference_duration", HISTOGRAM, "loradex_inference_seconds"),
    Alias("lorax_request_mean_time_per_token_duration", HISTOGRAM, "loradex_token_seconds"),
    Alias("lorax_request_input_length", HISTOGRAM, "loradex_request_prompt_tokens"),
    Alias("lorax_request_generated_tokens", HISTOGRAM, "loradex_request_generated_tokens"),
    Alias("lorax_queue_length", GAUGE, "loradex_requests_waiting"),
    Alias("lorax_batch_current_size", GAUGE, "loradex_requests_running"),
    Computed(
        "lorax_batch_current_max_tokens",
        ("loradex_kv_blocks_used", "loradex_kv_block_tokens"),
        lambda blocks, tokens: blocks * tokens,
    ),
    Alias("lorax_batch_next_size", HISTOGRAM, "loradex_step_rows"),
    Alias("lorax_batch_inference_count", UNTYPED, "loradex_steps"),
    Alias("lorax_batch_inference_duration", HISTOGRAM, "loradex_step_seconds"),
)
VLLM: tuple[Alias | Computed | Facts, ...] = (
    Alias("vllm:num_requests_running", GAUGE, "loradex_requests_running"),
    Alias("vllm:num_requests_waiting", GAUGE, "loradex_requests_waiting"),
    Computed(
        "vllm:kv_cache_usage_perc",
        ("loradex_kv_blocks_used", "loradex_kv_blocks_total"),
        lambda used, total: used / total if total else 0.0,
    ),
    Facts(
        "vllm:cache_config_info",
        {"block_size": "loradex_kv_block_tokens", "num_gpu_blocks": "loradex_kv_blocks_total"},
    ),
    Alias("vllm:num_preemptions", COUNTER, "loradex_preemptions"),
    Alias("vllm:prefix_cache_hits", COUNTER, "loradex_prefix_cache_hit_tokens"),
    Alias("vllm:prompt_tokens", COUNTER, "loradex_prompt_tokens"),
    Alias("vllm:generation_tokens", COUNTER, "loradex_tokens_generated"),
    Alias(
        "vllm:request_success",
        COUNTER,
        "loradex_request_ends",
        labels={"finished_reason": By("reason", REASONS)},
    ),
    Alias("vllm:time_to_first_token_seconds", HISTOGRAM, "loradex_request_first_token_seconds"),
    Alias("vllm:inter_token_latency_seconds", HISTOGRAM, "loradex_between_tokens_seconds"),
    Alias("vllm:e2e_request_latency_seconds", HISTOGRAM, "loradex_request_seconds"),
    Alias("vllm:request_queue_time_seconds", HISTOGRAM, "loradex_queue_seconds"),
    Alias("vllm:request_inference_time_seconds", HISTOGRAM, "loradex_inference_seconds"),
    Alias("vllm:request_time_per_output_token_seconds", HISTOGRAM, "loradex_token_seconds"),
    Alias("vllm:request_prompt_tokens", HISTOGRAM, "loradex_request_prompt_tokens"),
    Alias("vllm:request_generation_tokens", HISTOGRAM, "loradex_request_generated_tokens"),
)


def with_aliases(families: Families, model: str) -> Families:
    """What a process has reported, and the same under other names. vLLM's have its model."""
    ours = {name: samples for name, _, _, samples in families}
    return [*families, *_made(LORAX, ours, {}), *_made(VLLM, ours, {"model_name": model})]


def _made(
    aliases: Iterable[Alias | Computed | Facts], ours: Mapping[str, Samples], model: Labels
) -> Iterator[tuple[str, str, str, Samples]]:
    for alias in aliases:
        samples = alias.samples(ours, model)
        if samples is not None:
            yield alias.name, f"See {_named(alias)}", alias.kind, samples


def _named(alias: Alias | Computed | Facts) -> str:
    """Ours that it is made of."""
    match alias:
        case Alias():
            return alias.ours
        case Computed():
            return ", ".join(alias.ours)
        case Facts():
            return ", ".join(alias.ours.values())
