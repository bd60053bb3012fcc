"""What each adapter has answered, on /metrics."""

from frontend import metrics
from frontend.adapter_labels import AdapterLabels
from pipeline.messages import AdapterKey, FinishReason, Usage

OUTCOMES = ("answered", "failed")
KINDS = ("prompt", "generated")


class AdapterMetrics:
    """Counts the replies of one frontend; labels is how many adapters have one of their own."""

    def __init__(self, labels: int) -> None:
        self._labels = AdapterLabels(labels)

    def count(self, key: AdapterKey, reason: FinishReason, usage: Usage) -> None:
        """A request for this adapter has ended. What fails does not earn a label: whoever asks
        for adapters that there are not makes no series."""
        if reason == FinishReason.ERROR:
            metrics.ADAPTER_REQUESTS.labels(self._labels.find(key), "failed").inc()
            return
        ended = self._labels.use(key)
        if ended is not None:
            _end(ended)
        label = self._labels.find(key)
        metrics.ADAPTER_REQUESTS.labels(label, "answered").inc()
        metrics.ADAPTER_TOKENS.labels(label, "prompt").inc(usage.prompt_tokens)
        metrics.ADAPTER_TOKENS.labels(label, "generated").inc(usage.completion_tokens)
        if usage.completion_tokens:
            metrics.ADAPTER_FIRST_TOKEN_SECONDS.labels(label).observe(usage.first_token_seconds)


def _end(label: str) -> None:
    for outcome in OUTCOMES:
        metrics.ADAPTER_REQUESTS.remove(label, outcome)
    for kind in KINDS:
        metrics.ADAPTER_TOKENS.remove(label, kind)
    metrics.ADAPTER_FIRST_TOKEN_SECONDS.remove(label)
