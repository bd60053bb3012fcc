"""When steps begin and end on the device, and what of that is decoding or waiting to decode."""

import time
from typing import NamedTuple

import torch


class Moment:
    """When the device gets to this point of what has been launched; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = 0.0
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    @property
    def is_past(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Both must be past; nothing is waited for."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1000


class StepTimes(NamedTuple):
    """Of one step, which is over.

    decode_rows  empty if the step does anything else
    """

    start: Moment
    end: Moment
    decode_rows: frozenset[int]


class DecodeShare(NamedTuple):
    """Seconds of the device."""

    busy: float
    idle: float


def decode_share(step: StepTimes, before: StepTimes | None) -> DecodeShare:
    """What a step adds to the time of decoding, and to that of waiting for it.

    before  the step that was launched before it

    The device is idle between two decode steps only if the second was wanted already when the
    first ended: it goes on with a row of it. Other gaps are not counted.
    """
    if not step.decode_rows:
        return DecodeShare(0.0, 0.0)
    goes_on = before is not None and not step.decode_rows.isdisjoint(before.decode_rows)
    idle = step.start.seconds_since(before.end) if before is not None and goes_on else 0.0
    return DecodeShare(step.end.seconds_since(step.start), idle)
