"""Output tokens per second through HTTP and SSE, against the same load without them.

    python -m benchmarks.http_throughput [--model llama-3.1-8b] [--adapters 0 32] [--rounds 2]
        [--set NAME=VALUE ...] [--json FILE]

The load of benchmarks/gpu_throughput's first table: 128 requests of 128 tokens in and out at once.
First over ZeroMQ, by that benchmark's engine; then through all processes of a node, with one client
(benchmarks/load_client.py) for all streams. A token is a word here, so that prompts are text that
is tokenised, and replies are text that is detokenised, of about seven characters a token. Of each,
a round that is not counted comes first. The two servers run one after the other.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import Engine
from benchmarks.gpu_throughput import SHORT, Load, Point, run_point, sizes
from benchmarks.harness import Scene, common_options, prepare, prompt, room_in_memory
from benchmarks.machine import commit, machine
from benchmarks.models import make_model, make_tokenizer
from benchmarks.pipeline import MODULES, Pipeline, free_port, run_client
from pipeline.config import Settings
from pipeline.model_config import ModelConfig, read_model_config


def over_zeromq(
    settings: Settings, points: Sequence[Point], rounds: int, config: ModelConfig, folder: Path
) -> list[list[float]]:
    """Tokens per second of each round of each point."""
    generator = np.random.default_rng(0)
    with Engine(settings, folder / "engine") as engine:
        return [
            [one.tokens_per_second for one in run_point(engine, point, rounds, config, generator)]
            for point in points
        ]


def over_http(
    settings: Settings, points: Sequence[Point], rounds: int, config: ModelConfig, folder: Path
) -> list[list[dict[str, float]]]:
    """What each round of each point took; CPU is of cores, by process."""
    generator = np.random.default_rng(1)
    logs = folder / "node"
    logs.mkdir()
    pipeline = Pipeline(settings, {name: MODULES[name] for name in MODULES}, logs)
    found = []
    try:
        pipeline.wait_until_ready()
        for point in points:
            one_round(settings, point, config, generator, folder)
            measured = []
            for _ in range(rounds):
                before = pipeline.cpu_seconds()
                taken = one_round(settings, point, config, generator, folder)
                after = pipeline.cpu_seconds()
                used = {n: (after[n] - before[n]) / taken["seconds"] for n in before}
                measured.append(taken | used)
            found.append(measured)
        pipeline.stop()
    finally:
        pipeline.kill()
    return found


def one_round(
    settings: Settings,
    point: Point,
    config: ModelConfig,
    generator: np.random.Generator,
    folder: Path,
) -> dict[str, float]:
    names = point.names() or [""]
    load = point.load
    prompts = []
    for index in range(load.requests):
        tokens = prompt(load.tokens_in, config.vocabulary, generator)
        prompts.append((names[index % len(names)], " ".join(f"w{token}" for token in tokens)))
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    taken = run_client(settings, str(load.requests), str(load.tokens_out), str(path))
    return {
        "seconds": taken.seconds,
        "tokens_per_second": taken.tokens / taken.seconds,
        "first_token_seconds": taken.first_token_seconds,
        "events": taken.events,
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", nargs="+", type=int, default=[0, 32])
    parser.add_argument("--requests", type=int, default=SHORT.requests)
    parser.add_argument("--tokens", type=int, default=SHORT.tokens_in, help="in, and out")
    parser.add_argument("--rounds", type=int, default=2)
    common_options(parser)
    arguments = parser.parse_args(given)
    load = Load(arguments.requests, arguments.tokens, arguments.tokens)
    points = [Point(load, "rank16", count) for count in arguments.adapters]
    kinds = {name: kind for point in points for name, kind in point.adapter_kinds()}
    with tempfile.TemporaryDirectory() as name:
        config = read_model_config(make_model(arguments.model, Path(name)))
    wanted = sizes(points, config)
    scene = Scene(
        model=arguments.model,
        kinds=list(kinds.items()),
        settings={**wanted, "port": free_port(), "max_concurrent_requests": load.requests},
        changes=arguments.set,
        distinct=16,
    )
    parent = room_in_memory(wanted["adapter_pool_bytes"] + wanted["arena_bytes"])
    with tempfile.TemporaryDirectory(dir=parent, prefix="loradex-bench-") as name:
        folder = Path(name)
        settings, _ = prepare(scene, folder)
        make_tokenizer(Path(settings.model_folder))
        engine = over_zeromq(settings, points, arguments.rounds, config, folder)
        node = over_http(settings, points, arguments.rounds, config, folder)
    rows = [
        row_of(point, of_engine, of_node)
        for point, of_engine, of_node in zip(points, engine, node, strict=True)
    ]
    show(rows)
    if arguments.json:
        result = {"machine": machine(), "commit": commit(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def row_of(point: Point, engine: list[float], node: list[dict[str, float]]) -> dict[str, Any]:
    rate = statistics.mean(one["tokens_per_second"] for one in node)
    return {
        "adapters": point.adapters,
        "zeromq_tokens_per_second": engine,
        "share": rate / statistics.mean(engine),
        "http": node,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{machine()}, commit {commit()}\n")
    print("| adapters | ZeroMQ, tokens/s | HTTP, tokens/s | share | cores used by |")
    print("|---|---|---|---|---|")
    for row in rows:
        engine = " ".join(f"{rate:.0f}" for rate in row["zeromq_tokens_per_second"])
        node = " ".join(f"{one['tokens_per_second']:.0f}" for one in row["http"])
        used = ", ".join(f"{name} {row['http'][-1][name]:.2f}" for name in MODULES)
        print(f"| {row['adapters']} | {engine} | {node} | {row['share']:.3f} | {used} |")


if __name__ == "__main__":
    main()
