"""What grammars cost those that share a batch with them.

    python -m benchmarks.structured [--turns 7] [--tokens 64] [--model FOLDER] [--json FILE]

16 requests of 64 tokens in and 64 out, of the bundled model unless told otherwise, through
scheduler and GPU worker, in turns that alternate: no request has a grammar; 8 of them have one, two
each of four kinds, which go on for as long as the reply does. Greedy, and drawn at temperature 1.
Of each pair of neighbouring turns the rates are compared, so that what else the machine does
falls on both; the median of the pairs is the figure. So are the processor times of the GPU worker,
which others on the machine disturb less. The last line says how long the masks of a
step take to fill when nothing else happens.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine import GREEDY, Engine, Request
from benchmarks.harness import prompt, settings_from
from benchmarks.machine import commit, machine
from pipeline.config import Settings
from pipeline.grammars import compile_grammar, load_vocabulary, source_of
from pipeline.messages import Grammar, GrammarKind, Sampling
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
ROWS, CONSTRAINED, TOKENS_IN, TOKENS_OUT = 16, 8, 64, 64
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=7)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
ENDLESS = (
    Grammar(
        GrammarKind.JSON_SCHEMA, json.dumps({"type": "array", "items": PERSON, "minItems": 10_000})
    ),
    Grammar(
        GrammarKind.JSON_SCHEMA, json.dumps({"type": "array", "items": {}, "minItems": 10_000})
    ),
    Grammar(GrammarKind.REGEX, r"([0-9]{4}-[0-9]{2}-[0-9]{2}, ){500}"),
    Grammar(GrammarKind.LARK, 'start: expr ("+" expr){10000}\nexpr: /[a-z]{1,8}/ | "(" expr ")"'),
)


def requests(
    settings: Settings, constrained: int, sampling: Sampling, seed: int, tokens: int
) -> list[Request]:
    """Prompts that no turn has had before: nothing of them is cached."""
    generator = np.random.default_rng(seed)
    vocabulary = read_model_config(Path(settings.model_folder)).vocabulary
    sources = [source_of(grammar) for grammar in ENDLESS]
    return [
        Request(
            prompt(TOKENS_IN, vocabulary, generator),
            tokens,
            sampling=sampling,
            grammar=sources[row % len(sources)] if row < constrained else "",
        )
        for row in range(ROWS)
    ]


class Turn(NamedTuple):
    """16 replies."""

    tokens_per_second: float  # from the first submit to the last token
    processor_seconds: float  # of the GPU worker, all threads


def run(engine: Engine, batch: Sequence[Request]) -> Turn:
    start, processor = time.monotonic(), processor_seconds(engine)
    engine.run(batch)
    seconds = time.monotonic() - start
    tokens = sum(request.max_tokens for request in batch)
    return Turn(tokens / seconds, processor_seconds(engine) - processor)


def processor_seconds(engine: Engine) -> float:
    """Of the GPU worker so far."""
    stat = Path(f"/proc/{engine.pid('gpu_worker')}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) * TICK_SECONDS


def compare(engine: Engine, sampling: Sampling, turns: int, tokens: int) -> dict[str, Any]:
    """Turns without grammars and with, and of each pair the second by the first."""
    done: dict[int, list[Turn]] = {0: [], CONSTRAINED: []}
    for turn in range(-1, turns):
        order = (0, CONSTRAINED) if turn % 2 else (CONSTRAINED, 0)
        for constrained in order:
            seed = 2 * turn + bool(constrained) + 9
            batch = requests(engine.settings, constrained, sampling, seed, tokens)
            found = run(engine, batch)
            if turn >= 0:  # the first turn warms up
                done[constrained].append(found)
    pairs = list(zip(done[0], done[CONSTRAINED], strict=True))
    ratios = [bound.tokens_per_second / free.tokens_per_second for free, bound in pairs]
    processor = [free.processor_seconds / bound.processor_seconds for free, bound in pairs]
    return {
        "sampling": "greedy" if sampling == GREEDY else "drawn",
        "plain": [turn.tokens_per_second for turn in done[0]],
        "constrained": [turn.tokens_per_second for turn in done[CONSTRAINED]],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "processor_ratio": statistics.median(processor),
        "processor_ratios": processor,
    }


def fill_seconds(settings: Settings) -> float:
    """To fill the masks of CONSTRAINED rows, one after the other: the median over a reply."""
    folder = Path(settings.model_folder)
    config = read_model_config(folder)
    vocabulary = load_vocabulary(folder, eos_token_ids=config.eos_token_ids, size=config.vocabulary)
    generator = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in range(TOKENS_OUT)]
    for row in range(CONSTRAINED):
        matcher = compile_grammar(vocabulary, source_of(ENDLESS[row % len(ENDLESS)]))
        for step in times:
            start = time.perf_counter()
            octets = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            step.append(time.perf_counter() - start)
            allowed = np.flatnonzero(np.unpackbits(octets, bitorder="little"))
            matcher.consume_token(int(generator.choice(allowed)))
    return statistics.median(sum(step) for step in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=TOKENS_OUT, help="of each reply")
    parser.add_argument("--model", default="", help="folder of another model")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.model or str(model_folder(Settings()))
    with tempfile.TemporaryDirectory(prefix="loradex-bench-") as scratch:
        defaults = {"model_folder": folder, "run_dir": f"{scratch}/run", "prefix_cache": "false"}
        settings = settings_from(defaults, options.set)
        with Engine(settings, Path(scratch) / "logs") as engine:
            device = engine.facts["gpu_worker"].get("device_name")
            print(f"{machine()}, {device}, commit {commit()}", flush=True)
            rows = [
                compare(engine, sampling, options.turns, options.tokens)
                for sampling in (GREEDY, DRAWN)
            ]
        for row in rows:
            print(
                f"{row['sampling']}: {statistics.median(row['plain']):.0f} tokens/s without, "
                f"{statistics.median(row['constrained']):.0f} with {CONSTRAINED} of {ROWS} rows "
                f"constrained: {row['ratio']:.3f} (pairs {min(row['ratios']):.3f} to "
                f"{max(row['ratios']):.3f}); by processor time {row['processor_ratio']:.3f} "
                f"({min(row['processor_ratios']):.3f} to {max(row['processor_ratios']):.3f})"
            )
        seconds = fill_seconds(settings)
        print(f"masks of {CONSTRAINED} rows: {1e3 * seconds:.2f} ms per step, median")
    if options.json is not None:
        head = {"machine": machine(), "device": device, "commit": commit()}
        result = {**head, "rows": rows, "fill_seconds": seconds}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
