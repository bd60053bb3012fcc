"""The prompts that tokenizer workers have been sent and that somebody waits for: pure.

What such a worker has is lost when it dies. The one that takes its place is sent everything again,
with how much of each reply has come, and leaves that out.
"""

from collections.abc import Sequence

import msgspec

from frontend.streams import Stream
from pipeline.messages import GONE, Failure, FailureKind, Prompt


def died(times: int) -> Failure:
    return Failure(
        500,
        FailureKind.INTERNAL,
        f"the process that encodes and decodes this request has died {times} times",
    )


class OpenPrompt:
    """A prompt and what has come of it.

    streams     by choice
    max_deaths  of workers, one after the other, for which it may be the cause
    """

    def __init__(self, prompt: Prompt, streams: Sequence[Stream], max_deaths: int) -> None:
        self._prompt = prompt
        self._max_deaths = max_deaths
        self._streams = streams
        self._deaths = 0  # since anything has come
        self._progress = 0

    @property
    def open_ids(self) -> list[int]:
        return [one.request_id for one in self._streams if not one.ended]

    def again(self) -> Prompt | None:
        """To be sent to a worker that was started again; None if nobody waits for it, or if it has
        outlived too many workers already, and fails."""
        heard = tuple(GONE if one.ended else one.produced for one in self._streams)
        told = self._streams[0].prompt is not None
        progress = sum(heard) + told
        self._deaths = 1 if progress != self._progress else self._deaths + 1
        self._progress = progress
        if self._deaths >= self._max_deaths:
            for stream in self._streams:
                stream.fail(died(self._deaths))
        if not self.open_ids:
            return None
        return msgspec.structs.replace(
            self._prompt,
            heard=heard,
            prompt_details=self._prompt.prompt_details and not told,
        )


class OpenPrompts:
    """Those of one frontend.

    restart_limit  of the keep-alives: no request may use up more than half of it
    """

    def __init__(self, workers: int, restart_limit: int) -> None:
        self._max_deaths = max(1, restart_limit // 2)
        self._open: list[dict[int, OpenPrompt]] = [{} for _ in range(workers)]

    def add(self, worker: int, prompt: Prompt, streams: Sequence[Stream]) -> None:
        self._open[worker][prompt.request_id] = OpenPrompt(prompt, streams, self._max_deaths)

    def remove(self, worker: int, request_id: int) -> None:
        """Nobody waits for it; perhaps it was never sent."""
        self._open[worker].pop(request_id, None)

    def started(self, worker: int) -> list[Prompt]:
        """A worker was started again: what it is to be sent again."""
        sent = list(self._open[worker].values())  # what ends here may have another one sent
        again = [one.again() for one in sent]
        return [prompt for prompt in again if prompt is not None]

    def open_ids(self, worker: int) -> list[int]:
        """The requests at a worker that somebody waits for."""
        return [request_id for one in self._open[worker].values() for request_id in one.open_ids]
