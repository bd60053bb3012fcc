"""The row table of a worker that computes nothing: what is in a step, how many tokens it gives."""

from typing import NamedTuple

import numpy as np

from pipeline.messages import Step


class InStep(NamedTuple):
    """What one step does."""

    rows: int  # that decode
    kv_tokens: int  # that these attend to
    adapters: int  # distinct
    prompt_tokens: int
    sampled: int  # tokens that it gives


class Rows:
    """One sequence each. Rows without an adapter have slot -1."""

    def __init__(self, rows: int) -> None:
        self._position = np.zeros(rows, np.int64)  # the next to be fed
        self._slot = np.full(rows, -1)
        self._prefill_end = [0] * rows

    def apply(self, step: Step) -> InStep:
        """A step is sent."""
        for new in step.new_rows:
            self._slot[new.row] = new.slot
            self._prefill_end[new.row] = len(new.token_ids) // 4
        decode = np.frombuffer(step.decode_rows, np.int32)
        self._position[decode] += 1
        chunks = np.frombuffer(step.prefill, np.int32).reshape(-1, 3)
        used, fed = chunks[:, 0], chunks[:, 1] + chunks[:, 2]
        self._position[used] = fed
        ended = sum(self._prefill_end[row] == end for row, end in zip(used, fed, strict=True))
        slots = np.concatenate((self._slot[decode], self._slot[used])) + 1
        return InStep(
            rows=len(decode),
            kv_tokens=int(self._position[decode].sum()),
            adapters=int(np.count_nonzero(np.bincount(slots, minlength=1)[1:])),
            prompt_tokens=int(chunks[:, 2].sum()),
            sampled=len(decode) + ended,
        )
