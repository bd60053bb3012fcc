"""Whose the log-probabilities are that a step has given: rows of pipeline.logprobs."""

from pipeline.logprobs import split
from scheduler.sequence import Sequence
from scheduler.step_plan import Flight


class StepLogprobs:
    """Those of one step, none of which anybody else has got."""

    __slots__ = ("of_sampled", "prompts")

    def __init__(self, flight: Flight, logprobs: bytes) -> None:
        self.of_sampled: dict[int, bytes] = {}  # by index of flight.sampled
        self.prompts: list[tuple[Sequence, list[bytes]]] = []  # rows that were not known
        if not logprobs:
            return
        wanting = [at for at, one in enumerate(flight.sampled) if one.logprobs is not None]
        prompt_rows = sum(one.tokens for one in flight.scored)
        rows = split(logprobs, len(wanting) + prompt_rows)
        self.of_sampled = dict(zip(wanting, rows, strict=False))
        self._take_prompts(flight, rows[len(wanting) :])

    def _take_prompts(self, flight: Flight, rows: list[bytes]) -> None:
        """A sequence that was preempted may be scored again where it was before."""
        for sequence, start, count in flight.scored:
            chunk, rows = rows[:count], rows[count:]
            if sequence.ended:
                continue
            fresh = chunk[sequence.scored - start :]
            if not fresh:
                continue
            sequence.scored = start + count
            sequence.prompt_logprob_rows += fresh
            self.prompts.append((sequence, fresh))
