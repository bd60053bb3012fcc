"""Output tokens per second through the running pipeline, with any number of adapters in a batch.

    python -m benchmarks.gpu_throughput [--model llama-3.1-8b] [--points short long ...]
        [--adapters 0 1 8 ...] [--rounds 2] [--set NAME=VALUE ...] [--json FILE]

Scheduler, GPU worker and adapter loader run as in production; requests are token ids and come over
ZeroMQ, all of a round at once: greedy, ends ignored, random prompts that no prefix cache has seen,
the adapters in turn. One server for all points, with room for all adapters. Of each point, a round
that is not counted makes the adapters resident. Tokens per second are all produced tokens by the
time from the first submit to the last end.

`share` is that of the base model of the same load in the same run; `floor` is the time that
benchmarks/roofline.py asks for by the time that it took. A decode step is the median time between
two tokens while every request decodes.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import roofline
from benchmarks.adapters import AdapterKind, write_adapters
from benchmarks.harness import STATS_SECONDS, Engine, Metrics, Reply, Request, settings_from
from benchmarks.machine import commit, machine
from benchmarks.models import CONFIGS, make_model
from pipeline.config import Settings
from pipeline.model_config import ModelConfig, read_model_config

SHARED_MEMORY = Path("/dev/shm")
LARGEST_BLOCK = 256  # tokens
RANK_16 = AdapterKind()
KINDS: dict[str, tuple[AdapterKind, ...]] = {  # the adapters of a set take these in turn
    "rank16": (RANK_16,),
    "mixed": tuple(AdapterKind(rank=rank) for rank in (8, 16, 32, 64)),
    "qv": (AdapterKind(modules=("q_proj", "v_proj")),),
}


class Load(msgspec.Struct, frozen=True):
    """Requests that come at once. Sizes are tokens."""

    requests: int
    tokens_in: int
    tokens_out: int


class Point(msgspec.Struct, frozen=True):
    """One row of a table."""

    load: Load
    kinds: str  # a key of KINDS
    adapters: int  # distinct ones; 0 is the base model

    def names(self) -> list[str]:
        return [f"{self.kinds}-{number}" for number in range(self.adapters)]

    def adapter_bytes(self, config: ModelConfig) -> int:
        """Of all its adapters, packed in bfloat16."""
        return sum(kind.nbytes(config) for _, kind in self.adapter_kinds())

    def adapter_kinds(self) -> list[tuple[str, AdapterKind]]:
        of_set = KINDS[self.kinds]
        return [(name, of_set[index % len(of_set)]) for index, name in enumerate(self.names())]


SHORT, LONG, SINGLE = Load(128, 128, 128), Load(256, 512, 128), Load(1, 128, 128)
TABLES: dict[str, tuple[Load, str, tuple[int, ...]]] = {
    "short": (SHORT, "rank16", (0, 1, 8, 32, 64, 128)),
    "long": (LONG, "rank16", (0, 1, 8, 32, 128)),
    "single": (SINGLE, "rank16", (0, 1)),
    "mixed": (SHORT, "mixed", (32,)),
    "qv": (SHORT, "qv", (32,)),
}


class Round(msgspec.Struct, frozen=True):
    """What one round took. Times are seconds."""

    seconds: float
    tokens_per_second: float
    prefill_seconds: float  # until every request has its first token
    decode_step_seconds: float  # median; 0 if not all requests ever decode together
    worker: dict[str, float]  # what the worker says of its steps


# the GPU worker's counters; those that it does not have are left out
STEP_SUM, STEP_COUNT = "loradex_step_seconds_sum", "loradex_step_seconds_count"
IDLE, BUSY = "loradex_decode_idle_seconds_total", "loradex_decode_busy_seconds_total"


def prompts(load: Load, vocabulary: int, generator: np.random.Generator) -> list["array[int]"]:
    tokens = generator.integers(3, vocabulary - 256, (load.requests, load.tokens_in), np.int32)
    return [array("i", row.tobytes()) for row in tokens]


def requests(point: Point, vocabulary: int, generator: np.random.Generator) -> list[Request]:
    names: list[str | None] = [*point.names()] or [None]
    return [
        Request(prompt, point.load.tokens_out, names[index % len(names)])
        for index, prompt in enumerate(prompts(point.load, vocabulary, generator))
    ]


def measure(replies: Sequence[Reply], before: Metrics, after: Metrics) -> Round:
    start = min(reply.submitted for reply in replies)
    end = max(reply.times[-1] for reply in replies)
    all_decode = max(reply.times[0] for reply in replies)
    first_end = min(reply.times[-1] for reply in replies)
    arrivals = sorted({time for reply in replies for time in reply.times})
    together = [time for time in arrivals if all_decode <= time < first_end]
    steps = [later - earlier for earlier, later in pairwise(together)]
    return Round(
        seconds=end - start,
        tokens_per_second=sum(len(reply.times) for reply in replies) / (end - start),
        prefill_seconds=all_decode - start,
        decode_step_seconds=statistics.median(steps) if steps else 0.0,
        worker=worker_figures(before, after),
    )


def worker_figures(before: Metrics, after: Metrics) -> dict[str, float]:
    grown = {
        name: after.since(before, "gpu_worker", name) or 0.0
        for name in (STEP_SUM, STEP_COUNT, IDLE, BUSY)
    }
    figures = {}
    if grown[STEP_COUNT]:
        figures["steps"] = grown[STEP_COUNT]
        figures["step_seconds"] = grown[STEP_SUM] / grown[STEP_COUNT]
    if grown[BUSY]:
        figures["idle_share"] = grown[IDLE] / (grown[IDLE] + grown[BUSY])
    return figures


def run_point(
    engine: Engine, point: Point, rounds: int, config: ModelConfig, generator: np.random.Generator
) -> list[Round]:
    engine.run(requests(point, config.vocabulary, generator))
    measured = []
    before = engine.metrics()
    for _ in range(rounds):
        replies = engine.run(requests(point, config.vocabulary, generator))
        after = engine.metrics()
        measured.append(measure(replies, before, after))
        before = after
    return measured


# --- the server ---


def sizes(points: Sequence[Point], config: ModelConfig, element_bytes: int) -> dict[str, Any]:
    """Settings with room for every adapter and for the largest load."""
    kinds = {name: kind for point in points for name, kind in point.adapter_kinds()}
    adapter_bytes = [kind.nbytes(config, element_bytes) + 256 for kind in kinds.values()]
    pool_bytes = sum(adapter_bytes) + (1 << 20)
    rows = max(point.load.requests for point in points)
    tokens = max(
        point.load.requests * _padded(point.load.tokens_in + point.load.tokens_out + 64)
        for point in points
    )
    kv_token_bytes = 2 * config.layers * config.kv_heads * config.head_dim * element_bytes
    largest = max(adapter_bytes, default=0)
    return {
        "rows": rows,
        "step_tokens": max(4096, rows),
        "kv_cache_bytes": tokens * kv_token_bytes,
        "adapter_pool_bytes": pool_bytes,
        "adapter_slots": max(1, len(kinds)),
        "arena_bytes": min(pool_bytes, max(8 << 30, 16 * largest)) + (1 << 20),
        "loader_threads": 8,
    }


def _padded(tokens: int) -> int:
    """With room for blocks that are not full, of the largest size that a backend wants."""
    return -(-tokens // LARGEST_BLOCK) * LARGEST_BLOCK


def scratch_parent(nbytes: int) -> str:
    """Where adapters and arena find room: in memory if they do."""
    in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * nbytes
    return str(SHARED_MEMORY) if in_memory else tempfile.gettempdir()


def chosen_points(arguments: argparse.Namespace) -> list[tuple[str, Point]]:
    points = []
    for table in arguments.points:
        load, kinds, counts = TABLES[table]
        load = Load(
            load.requests if table == "single" else arguments.requests or load.requests,
            arguments.tokens_in or load.tokens_in,
            arguments.tokens_out or load.tokens_out,
        )
        for count in counts:
            wanted = arguments.adapters is None or count in arguments.adapters
            if wanted and count <= load.requests:
                points.append((table, Point(load, kinds, count)))
    if not points:
        raise SystemExit("no table has such a number of adapters for so many requests")
    return points


# --- the tables ---


def row_of(
    table: str, point: Point, measured: list[Round], base: float | None, floor: float | None
) -> dict[str, Any]:
    mean = statistics.mean(one.tokens_per_second for one in measured)
    return {
        "table": table,
        "adapters": point.adapters,
        "kinds": point.kinds,
        **msgspec.structs.asdict(point.load),
        "tokens_per_second": mean,
        "share_of_base": None if base is None else mean / base,
        "floor_tokens_per_second": floor,
        "share_of_floor": None if floor is None else mean / floor,
        "rounds": [msgspec.structs.asdict(one) for one in measured],
    }


HEADER = (
    "| load | adapters | tokens/s | of base | of floor | prefill, ms | decode step, ms "
    "| worker's step, ms | idle |\n|---|---|---|---|---|---|---|---|---|"
)


def show(row: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rounds = row["rounds"]
    last = rounds[-1]
    worker = last["worker"]
    cells = [
        f"{row['requests']} x {row['tokens_in']}/{row['tokens_out']}",
        f"{row['adapters']} {row['kinds']}" if row["adapters"] else "base",
        " ".join(f"{one['tokens_per_second']:.0f}" for one in rounds),
        share(row["share_of_base"]),
        share(row["share_of_floor"]),
        f"{1e3 * last['prefill_seconds']:.1f}",
        f"{1e3 * last['decode_step_seconds']:.2f}",
        f"{1e3 * worker['step_seconds']:.2f}" if "step_seconds" in worker else "",
        share(worker.get("idle_share")),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def run(
    engine: Engine, points: Sequence[tuple[str, Point]], rounds: int, config: ModelConfig
) -> list[dict[str, Any]]:
    """Every point, base first within each load; prints a row after each."""
    on_h200 = "H200" in str(engine.facts["gpu_worker"].get("device_name"))
    generator = np.random.default_rng(0)
    base_of: dict[Load, float] = {}
    rows = []
    print(HEADER)
    for table, point in points:
        measured = run_point(engine, point, rounds, config, generator)
        floor = None
        if on_h200:
            load = msgspec.structs.asdict(point.load)
            adapter_bytes = point.adapter_bytes(config)
            seconds = roofline.load_seconds(config, **load, adapter_bytes=adapter_bytes)
            floor = point.load.requests * point.load.tokens_out / seconds
        if point.adapters == 0:
            base_of[point.load] = statistics.mean(one.tokens_per_second for one in measured)
        rows.append(row_of(table, point, measured, base_of.get(point.load), floor))
        show(rows[-1])
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--points", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--adapters", nargs="+", type=int, help="only these numbers of them")
    parser.add_argument("--requests", type=int, help="in place of each table's own number")
    parser.add_argument("--tokens-in", type=int)
    parser.add_argument("--tokens-out", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--distinct", type=int, default=0, help="weight files; 0: one per adapter")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--folder", type=Path, help="for adapters and logs; kept afterwards")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    points = chosen_points(arguments)
    with tempfile.TemporaryDirectory() as name:
        config = read_model_config(make_model(arguments.model, Path(name)))
    element_bytes = 4 if config.dtype == "float32" else 2
    room = sizes([point for _, point in points], config, element_bytes)
    parent = scratch_parent(room["adapter_pool_bytes"] + room["arena_bytes"])
    with tempfile.TemporaryDirectory(dir=parent, prefix="loradex-bench-") as name:
        folder = arguments.folder or Path(name)
        kinds = {name: kind for _, point in points for name, kind in point.adapter_kinds()}
        start = time.monotonic()
        (folder / "adapters").mkdir(parents=True, exist_ok=True)
        write_adapters(folder / "adapters", config, list(kinds.items()), arguments.distinct)
        written = time.monotonic() - start
        settings = settings_from(
            {
                "load_format": "dummy",
                "model_folder": str(make_model(arguments.model, folder)),
                "adapter_root": [str(folder / "adapters")],
                "run_dir": f"{name}/run",
                "stats_seconds": STATS_SECONDS,
                **room,
            },
            arguments.set,
        )
        result = serve(settings, points, arguments, config, folder, written)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def serve(
    settings: Settings,
    points: Sequence[tuple[str, Point]],
    arguments: argparse.Namespace,
    config: ModelConfig,
    folder: Path,
    written: float,
) -> dict[str, Any]:
    with Engine(settings, folder / "logs") as engine:
        facts = engine.facts["gpu_worker"]
        print(
            f"{machine()}, {facts.get('device_name')}, commit {commit()}; adapters written in "
            f"{written:.1f} s, ready after {engine.start_seconds:.1f} s\n"
        )
        rows = run(engine, points, arguments.rounds, config)
    return {
        "machine": machine(),
        "device": facts.get("device_name"),
        "commit": commit(),
        "command": "python -m benchmarks.gpu_throughput " + " ".join(sys.argv[1:]),
        "model": arguments.model,
        "start_seconds": engine.start_seconds,
        "facts": facts,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
