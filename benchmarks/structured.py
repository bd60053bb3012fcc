"""What grammars cost those that share a batch with them.

    python -m benchmarks.structured [--turns 7] [--model FOLDER] [--set NAME=VALUE] [--json FILE]

16 requests of 64 tokens in and 64 out, of the bundled model unless told otherwise, through
scheduler and GPU worker, in turns that alternate: no request has a grammar; 8 of them have one, two
each of four kinds, which go on for as long as the reply does. Greedy, and drawn at temperature 1.
Of each pair of neighbouring turns the rates are compared, so that what else the machine does
falls on both; the median of the pairs is the figure. The last line says how long the masks of a
step take to fill when nothing else happens.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import GREEDY, Engine, Request
from benchmarks.harness import prompt, settings_from
from benchmarks.machine import commit, machine
from pipeline.config import Settings
from pipeline.grammars import compile_grammar, load_vocabulary, source_of
from pipeline.messages import Grammar, GrammarKind, Sampling
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder

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
    Grammar(GrammarKind.REGEX, r"([0-9]{4}-[0-9]{2}-[0-9]{2}, ){10000}"),
    Grammar(GrammarKind.LARK, 'start: expr ("+" expr){10000}\nexpr: /[a-z]{1,8}/ | "(" expr ")"'),
)


def requests(settings: Settings, constrained: int, sampling: Sampling, seed: int) -> list[Request]:
    """Prompts that no turn has had before: nothing of them is cached."""
    generator = np.random.default_rng(seed)
    vocabulary = read_model_config(Path(settings.model_folder)).vocabulary
    sources = [source_of(grammar) for grammar in ENDLESS]
    return [
        Request(
            prompt(TOKENS_IN, vocabulary, generator),
            TOKENS_OUT,
            sampling=sampling,
            grammar=sources[row % len(sources)] if row < constrained else "",
        )
        for row in range(ROWS)
    ]


def rate(engine: Engine, batch: Sequence[Request]) -> float:
    """Produced tokens per second, from the first submit to the last token."""
    start = time.monotonic()
    engine.run(batch)
    return len(batch) * TOKENS_OUT / (time.monotonic() - start)


def compare(engine: Engine, sampling: Sampling, turns: int) -> dict[str, Any]:
    """Rates without grammars and with, and of each pair the second by the first."""
    rates: dict[int, list[float]] = {0: [], CONSTRAINED: []}
    for turn in range(-1, turns):
        order = (0, CONSTRAINED) if turn % 2 else (CONSTRAINED, 0)
        for constrained in order:
            batch = requests(
                engine.settings, constrained, sampling, 2 * turn + bool(constrained) + 9
            )
            found = rate(engine, batch)
            if turn >= 0:  # the first turn warms up
                rates[constrained].append(found)
    ratios = [b / a for a, b in zip(rates[0], rates[CONSTRAINED], strict=True)]
    return {
        "sampling": "greedy" if sampling == GREEDY else "drawn",
        "plain": rates[0],
        "constrained": rates[CONSTRAINED],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
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
            rows = [compare(engine, sampling, options.turns) for sampling in (GREEDY, DRAWN)]
        for row in rows:
            print(
                f"{row['sampling']}: {statistics.median(row['plain']):.0f} tokens/s without, "
                f"{statistics.median(row['constrained']):.0f} with {CONSTRAINED} of {ROWS} rows "
                f"constrained: {row['ratio']:.3f} (pairs {min(row['ratios']):.3f} to "
                f"{max(row['ratios']):.3f})"
            )
        seconds = fill_seconds(settings)
        print(f"masks of {CONSTRAINED} rows: {1e3 * seconds:.2f} ms per step, median")
    if options.json is not None:
        head = {"machine": machine(), "device": device, "commit": commit()}
        result = {**head, "rows": rows, "fill_seconds": seconds}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
