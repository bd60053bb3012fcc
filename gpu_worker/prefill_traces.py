"""Spans of the prefills of requests that are traced. Pure."""

from array import array

from pipeline.messages import Span, Step


class _Prefill:
    __slots__ = ("cached_tokens", "ends_with", "started", "tokens", "trace")

    def __init__(self, trace: str, tokens: int, cached_tokens: int, started: float) -> None:
        self.trace = trace
        self.tokens = tokens
        self.cached_tokens = cached_tokens
        self.started = started
        self.ends_with: int | None = None  # the step that has its last chunk, once it is launched


class PrefillTraces:
    """Knows the rows that are prefilled and traced. Costs nothing while there is none."""

    def __init__(self) -> None:
        self._prefills: dict[int, _Prefill] = {}  # by row

    def launched(self, step: Step, now: float) -> None:
        """A step goes to the device."""
        if self._prefills:
            for row in (*array("i", step.free_rows), *(new.row for new in step.new_rows)):
                self._prefills.pop(row, None)
        for new in step.new_rows:
            if new.trace:
                tokens = len(new.token_ids) // 4
                self._prefills[new.row] = _Prefill(new.trace, tokens, new.cached_tokens, now)
        if not self._prefills:
            return
        chunks = array("i", step.prefill)
        for row, start, count in zip(chunks[::3], chunks[1::3], chunks[2::3], strict=True):
            prefill = self._prefills.get(row)
            if prefill is not None and start + count == prefill.tokens:
                prefill.ends_with = step.step_id

    def done(self, step_id: int, now: float) -> tuple[Span, ...]:
        """A step has its tokens; gives the spans of the prefills that ended with it."""
        if not self._prefills:
            return ()
        rows = [row for row, one in self._prefills.items() if one.ends_with == step_id]
        return tuple(_span(self._prefills.pop(row), now) for row in rows)


def _span(prefill: _Prefill, now: float) -> Span:
    attributes: dict[str, str | int | float | bool] = {
        "loradex.prefilled_tokens": prefill.tokens - prefill.cached_tokens
    }
    return Span(prefill.trace, "prefill", prefill.started, now, attributes)
