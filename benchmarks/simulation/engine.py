"""A GPU worker and an adapter loader that take the time of cost.py and do nothing else.

Steps run one after the other, copies of adapters beside them, one after the other as well. A step
that starts rows whose adapter is on its way ends after that copy. The loader is the real one's
core over simulated threads, so arena, leases and eviction are the product's.
"""

from array import array
from collections import deque
from collections.abc import Callable

from adapter_loader.core import Core, Discard, StartFetch, StartPack
from benchmarks.simulation import cost
from benchmarks.simulation.clock import Clock, Event
from benchmarks.simulation.rows import Rows
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterPlaced,
    AdapterStaged,
    LoadAdapter,
    PlaceAdapter,
    ReleaseAdapter,
    Step,
    StepDone,
)

TOKEN = 7  # what every step samples
LOAD_SECONDS = 300.0  # until a load has failed


class Engine:
    """done, placed: called when a step, or a placement, is."""

    def __init__(
        self,
        clock: Clock,
        *,
        rows: int,
        done: Callable[[StepDone], None],
        placed: Callable[[AdapterPlaced], None],
    ) -> None:
        self._clock = clock
        self._rows = Rows(rows)
        self._done = done
        self._placed = placed
        self._free_at = 0.0
        self._copies_end = 0.0
        self._arrives: dict[int, float] = {}  # by slot
        self.busy_seconds = 0.0
        self.steps = 0
        self.tokens = 0  # that were computed, of prompts and of replies
        self.adapters = 0  # distinct ones of each step, summed

    def send(self, step: Step) -> None:
        work = self._rows.apply(step)
        seconds = cost.step_seconds(
            rows=work.rows,
            kv_tokens=work.kv_tokens,
            adapters=work.adapters,
            prompt_tokens=work.prompt_tokens,
        )
        start = max(self._clock.now, self._free_at)
        copied = max((self._arrives.get(new.slot, 0.0) for new in step.new_rows), default=0.0)
        self._free_at = max(start + seconds, copied)
        self.busy_seconds += seconds
        self.steps += 1
        self.tokens += work.rows + work.prompt_tokens
        self.adapters += work.adapters
        done = StepDone(step.step_id, array("i", [TOKEN]).tobytes() * work.sampled)
        self._clock.at(self._free_at, lambda: self._done(done))

    def place(self, message: PlaceAdapter) -> None:
        copy = message.copy
        seconds = copy.nbytes / cost.COPY_BYTES_PER_SECOND
        seconds += sum(move.nbytes for move in message.moves) / cost.MOVE_BYTES_PER_SECOND
        self._copies_end = max(self._clock.now, self._copies_end) + seconds
        self._arrives[copy.slot] = self._copies_end
        self._clock.at(self._copies_end, lambda: self._placed(AdapterPlaced(copy.slot)))


class Loader:
    """answer: called with what the scheduler is to be told."""

    def __init__(
        self,
        clock: Clock,
        *,
        arena_bytes: int,
        threads: int,
        answer: Callable[[AdapterStaged | AdapterFailed | AdapterDropped], None],
    ) -> None:
        self._clock = clock
        self._core = Core(arena_bytes=arena_bytes, load_seconds=LOAD_SECONDS)
        self._answer = answer
        self._idle_threads = threads
        self._jobs: deque[tuple[float, Event]] = deque()
        self.packed = 0

    def send(self, message: LoadAdapter | ReleaseAdapter) -> None:
        if isinstance(message, LoadAdapter):
            self._core.load(message, self._clock.now)
        else:
            self._core.release(message)
        self._follow()

    def _follow(self) -> None:
        for action in self._core.take_actions():
            match action:
                case StartFetch():
                    self._start_fetch(action)
                case StartPack():
                    self._start_pack(action)
                case Discard():
                    pass
        for answer in self._core.take_outbox():
            self._answer(answer)

    def _start_fetch(self, action: StartFetch) -> None:
        key = action.key
        if action.known is not None:
            self._jobs.append((cost.SAME_SECONDS, lambda: self._core.unchanged(key)))
        else:
            fetched = (0,), cost.ADAPTER_BYTES, b""
            self._jobs.append((cost.OPEN_SECONDS, lambda: self._core.fetched(key, *fetched)))
        self._work()

    def _start_pack(self, action: StartPack) -> None:
        self.packed += 1
        seconds = action.nbytes / cost.PACK_BYTES_PER_SECOND
        key = action.key
        self._jobs.append((seconds, lambda: self._core.packed(key, key.id)))
        self._work()

    def _work(self) -> None:
        while self._jobs and self._idle_threads:
            seconds, end = self._jobs.popleft()
            self._idle_threads -= 1
            self._clock.at(self._clock.now + seconds, lambda end=end: self._ended(end))  # type: ignore[misc]

    def _ended(self, end: Event) -> None:
        self._idle_threads += 1
        end()
        self._work()
        self._follow()
