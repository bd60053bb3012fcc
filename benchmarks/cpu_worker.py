"""The GPU worker alone, on the CPU: 16 rows over 8 adapters, driven with Step messages.

    python -m benchmarks.cpu_worker [--dtype bfloat16|float32] [--threads N] [--profile]

8 random adapters of rank 8 on all seven linear layers of the default model, 64 tokens in, 64 out,
greedy. Prints produced tokens per second, the times of the prefill and of a decode step, and
with --profile the operators that take most of the time.
"""

import argparse
import mmap
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import commit, machine
from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.worker import Worker
from pipeline.adapter_layout import MODULES, layout, pack_ranks
from pipeline.config import Settings
from pipeline.messages import AdapterCopy, NewRow, PlaceAdapter, Sampling, Step
from pipeline.model_config import ModelConfig, read_model_config
from pipeline.model_folder import model_folder

ADAPTERS, ROWS, TOKENS_IN, TOKENS_OUT, RANK, BLOCK = 8, 16, 64, 64, 8, 16
BLOCKS = (TOKENS_IN + TOKENS_OUT) // BLOCK  # of one row


def ints(values: object) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def load_adapters(worker: Worker, config: ModelConfig, dtype: torch.dtype) -> None:
    ranks = [RANK] * (config.layers * len(MODULES))
    nbytes = layout(ranks, config.module_shapes(), dtype.itemsize).nbytes
    arena = mmap.mmap(-1, nbytes * ADAPTERS)
    weights = torch.randn(nbytes * ADAPTERS // dtype.itemsize).mul_(0.01).to(dtype)
    arena.write(weights.view(torch.uint8).numpy().tobytes())
    worker.attach_arena(arena)
    copies = tuple(
        AdapterCopy(slot, slot * nbytes, slot * nbytes, nbytes, pack_ranks(ranks))
        for slot in range(ADAPTERS)
    )
    for copy in copies:
        worker.place(PlaceAdapter(copy))


def prefill_steps(sampling: Sampling, lora: bool) -> list[Step]:
    """8 prompts in each of two steps, as a step of 512 tokens holds them."""
    generator = np.random.default_rng(0)
    new_rows = tuple(
        NewRow(
            row=row,
            slot=row % ADAPTERS if lora else -1,
            token_ids=ints(generator.integers(100, 40000, TOKENS_IN)),
            prompt_tokens=TOKENS_IN,
            cached_tokens=0,
            blocks=ints(range(row * BLOCKS, (row + 1) * BLOCKS)),
            sampling=sampling,
            logprobs=None,
        )
        for row in range(ROWS)
    )
    halves = (range(ROWS // 2), range(ROWS // 2, ROWS))
    return [
        Step(
            2,
            prefill=ints([[row, 0, TOKENS_IN] for row in half]),
            new_rows=tuple(new_rows[row] for row in half),
            free_rows=ints(half),
        )
        for half in halves
    ]


class Turn(NamedTuple):
    """Times in seconds; processor time counts all threads, and leaves out waiting for a core."""

    prefill: float
    prefill_processor: float
    decode: list[float]  # per step
    decode_processor: float

    def __str__(self) -> str:
        steps = len(self.decode)
        rate = ROWS * TOKENS_OUT / (self.prefill + sum(self.decode))
        return (
            f"{rate:.0f} tokens/s; prefill {1e3 * self.prefill:.0f} ms "
            f"(processor {1e3 * self.prefill_processor:.0f}); decode step "
            f"{1e3 * statistics.median(self.decode):.1f} ms, best {1e3 * min(self.decode):.1f} "
            f"(processor {1e3 * self.decode_processor / steps:.1f})"
        )


def turn(worker: Worker, prefill: list[Step]) -> Turn:
    """16 replies, from the prompts to the last token."""
    start, processor_start = time.perf_counter(), time.process_time()
    for step in prefill:
        worker.run(step)
    prefill_end, processor_prefill_end = time.perf_counter(), time.process_time()
    decode = Step(3, decode_rows=ints(range(ROWS)))
    seconds = []
    for _ in range(TOKENS_OUT - 1):
        step_start = time.perf_counter()
        worker.run(decode)
        seconds.append(time.perf_counter() - step_start)
    return Turn(
        prefill=prefill_end - start,
        prefill_processor=processor_prefill_end - processor_start,
        decode=seconds,
        decode_processor=time.process_time() - processor_prefill_end,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--base", action="store_true", help="no adapters")
    parser.add_argument("--sampled", action="store_true", help="temperature and top_p, not greedy")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    settings = Settings(dtype=options.dtype, gpu_threads=options.threads, kv_block_tokens=BLOCK)
    folder = Path(model_folder(settings))
    start = time.perf_counter()
    worker = build_worker(settings, folder, Figures(CollectorRegistry())).worker
    print(f"{machine()}, {torch.get_num_threads()} threads, {options.dtype}, commit {commit()}")
    print(f"weights loaded in {time.perf_counter() - start:.1f} s")
    load_adapters(worker, read_model_config(folder), getattr(torch, options.dtype))
    sampling = Sampling(temperature=0.8, top_p=0.9) if options.sampled else Sampling(temperature=0)
    prefill = prefill_steps(sampling, not options.base)
    turn(worker, prefill)
    for _ in range(options.turns):
        print(turn(worker, prefill))
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            turn(worker, prefill)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
