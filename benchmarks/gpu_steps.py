"""The GPU worker alone: what a step takes, and where in the step the time goes.

    python -m benchmarks.gpu_steps [--rows 128] [--adapters 0 1 8 32 64 128] [--profile 0 32]

Random weights of Llama-3.1-8B's shape, random adapters of rank 16 on all seven linear layers, and
prompts of 128 tokens. Decode steps follow each other as the pipeline sends them, without waiting; a
prefill step holds 32 prompts. With --profile, the kernels that take most of a decode and a prefill.
"""

import argparse
import mmap
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import settings_from
from benchmarks.machine import commit, machine
from benchmarks.models import make_model
from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.worker import Worker
from pipeline.adapter_layout import MODULES, layout, pack_ranks
from pipeline.messages import AdapterCopy, NewRow, PlaceAdapter, Sampling, Step
from pipeline.model_config import ModelConfig, read_model_config

PROMPT, RANK, PROMPTS_PER_STEP, DECODE_STEPS = 128, 16, 32, 40
LAYER = 10  # of which every kernel is shown
TOKENS = 256  # that a row may have


def ints(values: object) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def load_adapters(worker: Worker, config: ModelConfig, count: int) -> None:
    """One adapter's random bytes, copied into `count` extents of the pool."""
    ranks = [RANK] * (config.layers * len(MODULES))
    nbytes = layout(ranks, config.module_shapes(), 2).nbytes
    arena = mmap.mmap(-1, nbytes)
    weights = torch.randn(nbytes // 2).mul_(0.01).bfloat16()
    arena.write(weights.view(torch.uint8).numpy().tobytes())
    worker.attach_arena(arena)
    copies = tuple(
        AdapterCopy(slot, slot * nbytes, 0, nbytes, pack_ranks(ranks)) for slot in range(count)
    )
    for copy in copies:
        worker.place(PlaceAdapter(copy))


def prefill_steps(rows: int, adapters: int, vocabulary: int, blocks: int) -> list[Step]:
    generator = np.random.default_rng(0)
    steps = []
    for first in range(0, rows, PROMPTS_PER_STEP):
        some = range(first, min(first + PROMPTS_PER_STEP, rows))
        new_rows = tuple(
            NewRow(
                row=row,
                slot=row % adapters if adapters else -1,
                token_ids=ints(generator.integers(3, vocabulary, PROMPT)),
                prompt_tokens=PROMPT,
                cached_tokens=0,
                blocks=ints(range(row * blocks, (row + 1) * blocks)),
                sampling=Sampling(temperature=0),
                logprobs=None,
            )
            for row in some
        )
        chunks = ints([[row, 0, PROMPT] for row in some])
        steps.append(Step(2, prefill=chunks, new_rows=new_rows, free_rows=ints(list(some))))
    return steps


def seconds_of(worker: Worker, steps: Sequence[Step]) -> float:
    """All of them, launched one after the other with at most two in flight."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    launched = []
    for step in steps:
        launched.append(worker.launch(step))
        if len(launched) >= 2:
            launched[-2].result()
    launched[-1].result()
    return time.perf_counter() - start


def host_seconds(worker: Worker, step: Step, steps: int) -> float:
    """What launching one of them takes the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        worker.launch(step)
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host / steps


def show_layer(events: Any) -> None:
    """When each kernel of one layer, and of the next, started and ended."""
    kernels = sorted(
        (one for one in events if one.device_type == DeviceType.CUDA),
        key=lambda one: one.time_range.start,
    )
    layers = [index for index, one in enumerate(kernels) if "_rotate_and_store" in one.name]
    if len(layers) < LAYER + 3:
        return
    some = kernels[layers[LAYER] : layers[LAYER + 2] + 1]
    start = some[0].time_range.start
    for one in some:
        begin, end = one.time_range.start - start, one.time_range.end - start
        print(f"{begin:8.1f} to {end:8.1f} us {one.name[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32, 64, 128])
    parser.add_argument("--profile", type=int, nargs="*", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = make_model("llama-3.1-8b", Path(name))
        settings = settings_from(
            {
                "load_format": "dummy",
                "dtype": "bfloat16",
                "device": "cuda",
                "rows": options.rows,
                "step_tokens": 8192,
                "max_total_tokens": 1024,
                "adapter_pool_bytes": 12 << 30,
                "kv_cache_bytes": 16 << 30,
            },
            options.set,
        )
        start = time.perf_counter()
        built = build_worker(settings, folder, Figures(CollectorRegistry()))
        worker, block_tokens = built.worker, built.ready.block_tokens
        print(f"{machine()}, commit {commit()}, built in {time.perf_counter() - start:.1f} s")
        config = read_model_config(folder)
    load_adapters(worker, config, max(1, *options.adapters))
    print("| adapters | decode step, ms | of base | host, ms | prefill of 4,096, ms | of base |")
    print("|---|---|---|---|---|---|")
    base: tuple[float, float] | None = None
    decode = Step(3, decode_rows=ints(range(options.rows)))
    for adapters in options.adapters:
        prefill = prefill_steps(
            options.rows, adapters, config.vocabulary, -(-TOKENS // block_tokens)
        )
        for step in prefill:
            worker.run(step)
        prefilled = seconds_of(worker, prefill) / (options.rows * PROMPT / 4096)
        worker.run(decode)
        decoded = seconds_of(worker, [decode] * DECODE_STEPS) / DECODE_STEPS
        host = host_seconds(worker, decode, 20)
        base = base or (decoded, prefilled)
        print(
            f"| {adapters} | {1e3 * decoded:.2f} | {base[0] / decoded:.3f} | {1e3 * host:.2f} "
            f"| {1e3 * prefilled:.1f} | {base[1] / prefilled:.3f} |",
            flush=True,
        )
        if adapters in options.profile:
            for title, step in (("prefill", prefill[0]), ("decode", decode)):
                with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                    worker.run(step)
                print(f"{title}, {adapters} adapters")
                table = profiled.key_averages()
                for row in sorted(table, key=lambda one: -one.self_device_time_total)[:16]:
                    print(f"{row.self_device_time_total:10.0f} us {row.count:6d}  {row.key[:90]}")
                show_layer(profiled.events())


if __name__ == "__main__":
    main()
