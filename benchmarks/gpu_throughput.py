"""Output tokens per second through the running pipeline, with any number of adapters in a batch.

    python -m benchmarks.gpu_throughput [--model llama-3.1-8b] [--points short long ...]
        [--adapters 0 1 8 ...] [--rounds 2] [--set NAME=VALUE ...] [--json FILE]

Scheduler, GPU worker and adapter loader run as in production; requests are token ids and come over
ZeroMQ, all of a round at once: greedy, ends ignored, random prompts that no prefix cache has seen,
the adapters in turn. One server for all points, with room for all adapters. Of each point, a round
that is not counted makes the adapters resident. Tokens per second are all produced tokens by the
time from the first submit to the last end.

`of base` is the share of the base model's rate at the same load in the same run, `of floor` that of
the rate which benchmarks/roofline.py allows an H200. Prefill lasts until every request has its
first token; a decode step is the mean time between two tokens while every request decodes (a median
would be wrong where the tokens of two steps arrive together). What the worker says of its steps
comes from its metrics. Adapters share a few weight files, by hard links:
in the arena and on the device each has its own bytes.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import roofline
from benchmarks.adapters import AdapterKind
from benchmarks.engine import Engine, Metrics, Reply, Request
from benchmarks.harness import (
    Results,
    Scene,
    common_options,
    prompt,
    room_in_memory,
    serving,
)
from benchmarks.models import make_model
from pipeline.model_config import ModelConfig, read_model_config

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
    decode_step_seconds: float  # mean; 0 if not all requests ever decode together
    worker: dict[str, float]  # what the worker says of its steps


# the GPU worker's counters; those that it does not have are left out
STEP_SUM, STEP_COUNT = "loradex_step_seconds_sum", "loradex_step_seconds_count"
IDLE, BUSY = "loradex_decode_idle_seconds_total", "loradex_decode_busy_seconds_total"


def requests(point: Point, vocabulary: int, generator: np.random.Generator) -> list[Request]:
    names: list[str | None] = [*point.names()] or [None]
    load = point.load
    return [
        Request(
            prompt(load.tokens_in, vocabulary, generator),
            load.tokens_out,
            names[index % len(names)],
        )
        for index in range(load.requests)
    ]


def measure(replies: Sequence[Reply], before: Metrics, after: Metrics) -> Round:
    start = min(reply.submitted for reply in replies)
    end = max(reply.times[-1] for reply in replies)
    all_decode = max(reply.times[0] for reply in replies)
    first_end = min(reply.times[-1] for reply in replies)
    arrivals = sorted({time for reply in replies for time in reply.times})
    together = [time for time in arrivals if all_decode <= time < first_end]
    return Round(
        seconds=end - start,
        tokens_per_second=sum(len(reply.times) for reply in replies) / (end - start),
        prefill_seconds=all_decode - start,
        decode_step_seconds=mean_step(together),
        worker=worker_figures(before, after),
    )


def mean_step(arrivals: Sequence[float]) -> float:
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else 0.0


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


def sizes(points: Sequence[Point], config: ModelConfig) -> dict[str, Any]:
    """Settings with room for every adapter and for the largest load."""
    element_bytes = 4 if config.dtype == "float32" else 2
    kinds = {name: kind for point in points for name, kind in point.adapter_kinds()}
    adapter_bytes = [kind.nbytes(config, element_bytes) + 256 for kind in kinds.values()]
    pool_bytes = sum(adapter_bytes) + (1 << 20)
    rows = max(point.load.requests for point in points)
    return {
        "rows": rows,
        "step_tokens": max(4096, rows),
        "adapter_pool_bytes": pool_bytes,
        "adapter_slots": max(1, len(kinds)),
        "arena_bytes": min(pool_bytes, max(8 << 30, 16 * max(adapter_bytes, default=0))),
    }


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
        f"{1e3 * last['decode_step_seconds']:.2f}" if last["decode_step_seconds"] else "",
        f"{1e3 * worker['step_seconds']:.2f}" if "step_seconds" in worker else "",
        share(worker.get("idle_share")),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def run(
    engine: Engine,
    points: Sequence[tuple[str, Point]],
    rounds: int,
    config: ModelConfig,
    results: Results,
) -> None:
    """Every point, base first within each load; prints a row after each."""
    on_h200 = "H200" in str(engine.facts["gpu_worker"].get("device_name"))
    generator = np.random.default_rng(0)
    base_of: dict[Load, float] = {}
    print(HEADER)
    for table, point in points:
        measured = run_point(engine, point, rounds, config, generator)
        floor = floor_rate(point, config) if on_h200 else None
        if point.adapters == 0:
            base_of[point.load] = statistics.mean(one.tokens_per_second for one in measured)
        results.add(row_of(table, point, measured, base_of.get(point.load), floor))
        show(results.rows[-1])


def floor_rate(point: Point, config: ModelConfig) -> float:
    """Tokens per second that the hardware allows."""
    load = point.load
    seconds = roofline.load_seconds(
        config, **msgspec.structs.asdict(load), adapter_bytes=point.adapter_bytes(config)
    )
    return load.requests * load.tokens_out / seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--adapters", nargs="+", type=int, help="only these numbers of them")
    parser.add_argument("--requests", type=int, help="in place of each table's own number")
    parser.add_argument("--tokens-in", type=int)
    parser.add_argument("--tokens-out", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--distinct", type=int, default=16, help="weight files of a kind; 0: all")
    common_options(parser)
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    named_points = chosen_points(arguments)
    points = [point for _, point in named_points]
    with tempfile.TemporaryDirectory() as name:
        config = read_model_config(make_model(arguments.model, Path(name)))
    settings = sizes(points, config)
    scene = Scene(
        model=arguments.model,
        kinds=list(
            {name: kind for point in points for name, kind in point.adapter_kinds()}.items()
        ),
        settings=settings,
        changes=arguments.set,
        distinct=arguments.distinct,
        parent=room_in_memory(settings["adapter_pool_bytes"] + settings["arena_bytes"]),
    )
    with serving(scene) as engine:
        results = Results(engine, "benchmarks.gpu_throughput", arguments.json)
        run(engine, named_points, arguments.rounds, config, results)


if __name__ == "__main__":
    main()
