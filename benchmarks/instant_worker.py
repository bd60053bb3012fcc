"""A GPU worker that answers at once, with tokens from a fixed list: what is left is the pipeline.

    python -m benchmarks.instant_worker [SECONDS]

It keeps of each row what it must know to count a step's tokens. With SECONDS, each step takes at
least that long after the one before, as on a device. Prints `steps=N` at its end.
"""

import random
import sys
import time
from array import array
from functools import partial

from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterPlaced,
    AttachArena,
    PeerStarted,
    PlaceAdapter,
    ProcessReady,
    Shutdown,
    Step,
    StepDone,
    ToGpuWorker,
    WorkerReady,
)
from pipeline.process import run

NAME = "gpu_worker"
KV_BLOCKS = 1 << 18
WORDS = range(1000, 30000)  # token ids of ordinary text in the default model's vocabulary
LIST_TOKENS = 1 << 16
CPU_ROWS, CPU_STEP_TOKENS = 64, 512


class InstantWorker:
    """The tokens of each step."""

    def __init__(self) -> None:
        generator = random.Random(0)
        self._tokens = array("i", generator.choices(WORDS, k=LIST_TOKENS)).tobytes()
        self._at = 0  # bytes
        self._row_tokens: dict[int, int] = {}  # row -> tokens that it is prefilled with
        self.steps = 0

    def run(self, step: Step) -> StepDone:
        self.steps += 1
        for row in step.new_rows:
            self._row_tokens[row.row] = len(row.token_ids) // 4
        nbytes = len(step.decode_rows) + 4 * self._complete(step.prefill)
        if self._at + nbytes > len(self._tokens):
            self._at = 0
        start, self._at = self._at, self._at + nbytes
        return StepDone(step.step_id, self._tokens[start : self._at])

    def _complete(self, prefill: bytes) -> int:
        """How many chunks reach the end of their row's tokens."""
        numbers = array("i", prefill)
        return sum(
            start + count == self._row_tokens[row]
            for row, start, count in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        )


def main(settings: Settings, incarnation: Incarnation, *, step_seconds: float) -> None:
    index = incarnation.index
    run_dir = settings.run_folder()
    outbox = Outbox(run_dir, incarnation)
    inbox: Inbox[ToGpuWorker] = Inbox(run_dir, NAME, index, ToGpuWorker, outbox)
    outbox.greet("scheduler")
    outbox.greet("frontend", settings.frontends)
    ready = WorkerReady(
        kv_blocks=KV_BLOCKS,
        block_tokens=settings.kv_block_tokens or 16,
        adapter_pool_bytes=settings.adapter_pool_bytes or 1 << 29,
        adapter_slots=settings.adapter_slots,
        rows=settings.rows or CPU_ROWS,
        step_tokens=settings.step_tokens or CPU_STEP_TOKENS,
    )
    outbox.send("scheduler", ready)
    for frontend in range(settings.frontends):
        outbox.send("frontend", ProcessReady(NAME, index), frontend)
    worker = InstantWorker()
    working = True
    done_at = time.monotonic()
    while working:
        for message in inbox.receive():
            match message:
                case Step():
                    done_at = max(done_at + step_seconds, time.monotonic())
                    time.sleep(max(0.0, done_at - time.monotonic()))
                    outbox.send("scheduler", worker.run(message))
                case PlaceAdapter():
                    outbox.send("scheduler", AdapterPlaced(message.copy.slot))
                case Shutdown():
                    working = False
                case AttachArena() | PeerStarted():
                    pass  # no adapter is ever read, and nobody starts again
    print(f"steps={worker.steps}", flush=True)
    outbox.close()
    inbox.close()


if __name__ == "__main__":
    run(NAME, partial(main, step_seconds=float(sys.argv[1]) if sys.argv[1:] else 0.0))
