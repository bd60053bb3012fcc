"""The worker: applies one Step after the other to the device's memory, and gives its tokens.

Knows no socket, and never waits for the device: a step is launched, and asked later whether it is
done. Steps may be launched ahead of their predecessors' results, since what a decode row feeds is
read from the history, on the device.
"""

import time
from collections.abc import Sequence
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.batch import HostBatch, make_batch
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.device import to_device
from gpu_worker.figures import Figures
from gpu_worker.forward import Forward
from gpu_worker.grammars import Grammars, Masks
from gpu_worker.history import History
from gpu_worker.logprobs import PromptScores
from gpu_worker.pooling import Means, StepEmbeddings
from gpu_worker.rows import NO_LOGPROBS, RowTable
from gpu_worker.sampling import SampledRows, sample
from gpu_worker.step_times import Moment, StepTimes, decode_share
from gpu_worker.watermark import USUAL, Watermark
from pipeline.messages import GRAMMAR_GAVE_UP, NewRow, PlaceAdapter, Step, StepDone


class Launched:
    """A step on its way through the device."""

    def __init__(self, step: Step, index: int, device: torch.device) -> None:
        self._step_id = step.step_id
        self._index = index
        self._device = device
        self._launched = time.perf_counter()
        self._decode_rows = b"" if step.prefill else step.decode_rows
        self._tokens: Tensor | None = None
        self._logprobs: list[Tensor] = []
        self._embeddings: Tensor | None = None
        self._start: Moment | None = None
        self._end: Moment | None = None

    def starts(self) -> None:
        """What has been launched so far prepares it; now tokens go through the model."""
        self._start = Moment(self._device)

    def gives(self, tokens: Tensor) -> None:
        """Start to copy what was sampled to the host: int64[n]."""
        self._tokens = tokens.int().to("cpu", non_blocking=True)

    def gives_logprobs(self, rows: Tensor) -> None:
        """Start to copy rows of pipeline.logprobs to the host; behind those that came before."""
        self._logprobs.append(rows.to("cpu", non_blocking=True))

    def gives_embeddings(self, embeddings: Tensor) -> None:
        """Start to copy them to the host: float32[n, hidden]."""
        self._embeddings = embeddings.to("cpu", non_blocking=True)

    def ends(self) -> None:
        """Nothing more will be launched for it."""
        self._end = Moment(self._device)

    @property
    def is_done(self) -> bool:
        return self._end is not None and self._end.is_past

    @property
    def seconds(self) -> float:
        """Since it was launched."""
        return time.perf_counter() - self._launched

    @property
    def times(self) -> StepTimes | None:
        """Once it is done; None if no tokens went through the model."""
        if self._start is None or self._end is None:
            return None
        rows = np.frombuffer(self._decode_rows, np.int32).tolist()
        return StepTimes(self._start, self._end, frozenset(rows))

    def tokens_on_host(self) -> NDArray[np.int32]:
        """int32[sampled]; waits until they are there. To be called once its end was launched."""
        assert self._end is not None
        assert self._tokens is not None
        self._end.wait()
        tokens: NDArray[np.int32] = self._tokens.numpy()
        return tokens

    def result(self) -> StepDone:
        """Waits until it is done."""
        if self._end is not None:
            self._end.wait()
        return StepDone(
            self._step_id,
            b"" if self._tokens is None else self._tokens.numpy().tobytes(),
            b"".join(rows.numpy().tobytes() for rows in self._logprobs),
            index=self._index,
            embeddings=b"" if self._embeddings is None else self._embeddings.numpy().tobytes(),
        )


class _Unsampled(NamedTuple):
    """A step whose forward pass was launched, and whose tokens are not sampled yet."""

    launched: Launched
    host: HostBatch
    logits: Tensor  # [sampled, vocabulary]
    masks: Masks | None
    top: int
    scores: PromptScores | None
    embeddings: StepEmbeddings | None


class Worker:
    """One device: its weights, KV cache, adapter pool, row table and history."""

    def __init__(
        self,
        *,
        forward: Forward,
        adapters: AdapterPool | CudaAdapterPool,
        rows: RowTable,
        history: History,
        figures: Figures,
        grammars: Grammars,
        device: torch.device,
        index: int = 0,
        watermark: Watermark = USUAL,
    ) -> None:
        self.grammars = grammars
        self._unsampled: _Unsampled | None = None
        self._forward = forward
        self.adapters = adapters
        self.rows = rows
        self.history = history
        self._figures = figures
        self._device = device
        self._index = index
        self._watermark = watermark
        self._means = Means()
        self._times_before: StepTimes | None = None  # of the step that ended last

    def attach_arena(self, arena: mmap) -> None:
        """Adapters are copied out of this from now on."""
        self.adapters.attach_arena(arena)

    @torch.inference_mode()
    def start_over(self, grammars: Grammars) -> None:
        """For another scheduler: rows, slots and grammars are nobody's, once what was launched has
        ended. Its results are of no use any more."""
        self.sample_launched(wait=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.adapters.start_over()
        self.rows.free(np.arange(len(self.rows.length), dtype=np.int32))
        self.grammars.close()
        self.grammars = grammars
        self._times_before = None

    @torch.inference_mode()
    def place(self, message: PlaceAdapter) -> None:
        """Start to bring an adapter in: steps that are launched from now on find it there, and
        wait if they must."""
        self.adapters.place(message)
        self._figures.copied_bytes.inc(message.copy.nbytes)
        self._figures.moved_bytes.inc(sum(move.nbytes for move in message.moves))

    @torch.inference_mode()
    def advance(self, seconds: float) -> bool:
        """Bring adapters in for about so long, where this thread has to do it. Returns whether it
        had."""
        return self.adapters.advance(seconds)

    def placed(self) -> list[int]:
        """Slots of the adapters that have come in since the last call, in order."""
        slots = self.adapters.placed()
        self._figures.copies.inc(len(slots))
        return slots

    def run(self, step: Step) -> StepDone:
        """Run a step to its end. Raises ValueError for one that contradicts the row table."""
        launched = self.launch(step)
        self.sample_launched(wait=True)
        done = launched.result()
        self.count(launched)
        return done

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start a step. Raises ValueError for one that contradicts the row table.

        If masks are not ready when its forward pass is launched, sampling is left to
        `sample_launched`, or to the next launch: the device is busy until then.
        """
        self.sample_launched(wait=True)
        launched = Launched(step, self._index, self._device)
        self._change(step)
        if not (step.decode_rows or step.prefill):
            launched.ends()
            return launched
        computed = self._compute(make_batch(step, self.rows), launched)
        self._count_tokens(computed.host)
        if computed.masks is None:
            self._give(computed)
            launched.ends()
        else:
            self._unsampled = computed
            self.sample_launched()
        return launched

    @torch.inference_mode()
    def sample_launched(self, *, wait: bool = False) -> bool:
        """Launch the sampling that was left, if its masks are ready or are to be waited for.
        Returns whether there was something to do."""
        left = self._unsampled
        if left is None or left.masks is None or not (wait or left.masks.is_ready):
            return False
        left.masks.wait()
        self._unsampled = None
        self._give(left)
        left.launched.ends()
        self.grammars.advance(left.masks, left.launched)
        return True

    @torch.inference_mode()
    def rehearse(self, step: Step) -> None:
        """Run a step that is not counted and whose tokens nobody wants."""
        self._change(step)
        if step.decode_rows or step.prefill:
            launched = Launched(step, self._index, self._device)
            self._give(self._compute(make_batch(step, self.rows), launched))

    @torch.inference_mode()
    def logits(self, host: HostBatch) -> Tensor:
        """[sampled, vocabulary] of a batch; its keys and values are in the cache then. As with
        `launch`, at most two may be under way: a third fills the buffers of the first again."""
        return self._forward.run(host, self.history, lambda: None)

    def count(self, launched: Launched) -> None:
        """A step has ended. To be called for each, in order."""
        times = launched.times
        if times is not None:
            self._figures.step_seconds.observe(launched.seconds)
            share = decode_share(times, self._times_before)
            self._figures.decode_busy_seconds.inc(share.busy)
            self._figures.decode_idle_seconds.inc(share.idle)
            self._times_before = times

    def _change(self, step: Step) -> None:
        freed = np.frombuffer(step.free_rows, np.int32)
        self.rows.free(freed)
        self._means.forget(freed.tolist())
        fresh = self._take(step.new_rows)
        appended = np.frombuffer(step.blocks, np.int32)
        grown = np.frombuffer(step.block_rows, np.int32)
        self.rows.append_blocks(grown, appended)
        blocks = np.concatenate((*fresh, appended.astype(np.int64)))
        changed = np.union1d(grown, np.array([new.row for new in step.new_rows], np.int32))
        self._forward.pages_changed(self.rows, changed.astype(np.int64), blocks)

    def _take(self, new_rows: Sequence[NewRow]) -> list[NDArray[np.int64]]:
        for new in new_rows:
            self.grammars.take(new)
            self.history.write(new.row, np.frombuffer(new.token_ids, np.int32).copy())
        return [self.rows.take(new) for new in new_rows]

    def _compute(self, host: HostBatch, launched: Launched) -> _Unsampled:
        """Launch the forward pass, while masks are being filled."""
        masks = self.grammars.fill(host.sampled_rows)
        top = self._top(host)
        scores = self._scores(host, top) if len(host.scored) else None
        embeddings = self._embeddings(host) if host.pooled else None
        readers = [reader for reader in (scores, embeddings) if reader is not None]
        logits = self._forward.run(host, self.history, launched.starts, readers)
        return _Unsampled(launched, host, logits, masks, top, scores, embeddings)

    def _give(self, computed: _Unsampled) -> None:
        """The step's tokens, and the log-probabilities that its rows want."""
        launched, scores = computed.launched, computed.scores
        if len(computed.host.sampled_rows):
            tokens, logprobs = self._sample(computed)
            launched.gives(tokens)
            if logprobs is not None:
                launched.gives_logprobs(logprobs)
        if scores is not None and scores.rows is not None:
            launched.gives_logprobs(scores.rows)
        embeddings = computed.embeddings
        if embeddings is not None and embeddings.embeddings is not None:
            launched.gives_embeddings(embeddings.embeddings)

    def _top(self, host: HostBatch) -> int:
        """What the rows of log-probabilities of this step hold: what the one who wants most does,
        since they are equally long."""
        most = int(self.rows.top[host.sampled_rows].max(initial=0))
        if not len(host.scored):
            return most
        return max(most, int(self.rows.prompt_top[host.token_rows[host.scored]].max()))

    def _scores(self, host: HostBatch, top: int) -> PromptScores:
        scored = host.scored
        return PromptScores(
            scored=self._tensor(scored),
            rows=self._tensor(host.token_rows[scored]),
            positions=self._tensor(host.positions[scored] + 1),
            history=self.history,
            top=top,
        )

    def _embeddings(self, host: HostBatch) -> StepEmbeddings:
        rows = [chunk.row for chunk in host.pooled]
        return StepEmbeddings(
            host.pooled,
            pooling=self.rows.pooling,
            lengths={row: int(self.rows.length[row]) for row in rows},
            means=self._means,
        )

    def _sample(self, computed: _Unsampled) -> tuple[Tensor, Tensor | None]:
        logits, masks = computed.logits, computed.masks
        table, rows = self.rows, computed.host.sampled_rows
        lengths = table.length[rows]
        sampled = SampledRows(
            params=table.sampling[rows],
            rows=rows,
            history=self.history.tokens,
            lengths=lengths,
            prompt_tokens=table.prompt_tokens[rows],
            logprobs=table.top[rows] != NO_LOGPROBS,
            top=computed.top,
            biases=table.biases.of_step(rows, lengths),
            watermark=self._watermark,
        )
        masked = None if masks is None else masks.apply(logits)
        tokens, logprobs = sample(logits, sampled, masked)
        if masks is not None and masks.gave_up:
            tokens.index_fill_(0, self._tensor(np.array(masks.gave_up)), GRAMMAR_GAVE_UP)
        self.history.append(self._tensor(rows), self._tensor(sampled.lengths), tokens)
        table.advance(rows)
        return tokens, logprobs

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return to_device(array, self._device)

    def _count_tokens(self, host: HostBatch) -> None:
        decoded = host.sequences.decode_rows
        self._figures.decode_tokens.inc(decoded)
        self._figures.prefill_tokens.inc(len(host.token_rows) - decoded)
        self._figures.sampled_tokens.inc(len(host.sampled_rows))
