"""Spans of the loads that requests which are traced have asked for. Pure."""

from dataclasses import dataclass

from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    LoadAdapter,
    Span,
    Tier,
)


@dataclass(slots=True)
class _Load:
    trace: str
    started: float
    tier: Tier = Tier.DISK  # where it was found


class LoadTraces:
    """Knows the loads that are traced until they are answered. Times are time.monotonic()."""

    def __init__(self) -> None:
        self._loads: dict[AdapterKey, list[_Load]] = {}

    def asked(self, message: LoadAdapter, now: float) -> None:
        if message.trace:
            self._loads.setdefault(message.adapter, []).append(_Load(message.trace, now))

    def unchanged(self, key: AdapterKey) -> None:
        """What lies in the arena is what its source has."""
        for load in self._loads.get(key, ()):
            load.tier = Tier.HOST

    def answered(
        self, answer: AdapterStaged | AdapterFailed | AdapterDropped, now: float
    ) -> tuple[Span, ...]:
        if not self._loads or isinstance(answer, AdapterDropped):
            return ()
        key = answer.adapter
        return tuple(_span(load, answer, now) for load in self._loads.pop(key, ()))


def _span(load: _Load, answer: AdapterStaged | AdapterFailed, now: float) -> Span:
    attributes: dict[str, str | int | float | bool] = {
        "loradex.adapter.source": answer.adapter.source,
        "loradex.adapter.tier": load.tier.value,
    }
    failed = isinstance(answer, AdapterFailed)
    if isinstance(answer, AdapterFailed):
        attributes["error.type"] = answer.failure.kind.value
    else:
        attributes["loradex.adapter.bytes"] = answer.nbytes
    return Span(load.trace, "adapter load", load.started, now, attributes, failed)
