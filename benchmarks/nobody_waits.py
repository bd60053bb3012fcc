"""Do streams notice that adapters are loaded? Gaps between tokens with and without loads.

    python -m benchmarks.nobody_waits [--pairs 6] [--set NAME=VALUE ...] [--json FILE]

Scheduler, GPU worker (on the CPU) and adapter loader, with 8 streams of the base model, shapes of
SmolLM2-360M in bf16. Runs come in pairs. In the first of a pair 50 adapters that nobody has seen
are asked for at once: 48 of rank 8 (8.7 MB), one of 503 MB, and one from a web server that stalls
in the middle of its weights. In the second nothing else happens. Gaps count from the moment of the
asking until the 49 have been copied into the worker's pool; of the quiet run, as many tokens.
"""

import argparse
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from benchmarks.adapters import AdapterKind
from benchmarks.engine import Engine, Reply, Request
from benchmarks.gpu_adapters import loads, milliseconds
from benchmarks.harness import Results, Scene, common_options, prompt, serving
from pipeline.messages import AdapterKey

MODEL = "smollm2-360m"
VOCABULARY = 49152
STREAMS, TOKENS_IN = 8, 16
SMALL, LARGE = AdapterKind(rank=8), AdapterKind(rank=464)
SMALL_ADAPTERS = 48
LOCAL_ADAPTERS = SMALL_ADAPTERS + 1
STALLED_BYTES = 8 << 20  # of which half are sent
MAX_TOKENS = 4000  # of a stream
WARM_UP_TOKENS = 30


class Run(NamedTuple):
    """Eight streams, from the moment at which all have a token until the run is over."""

    gaps: list[float]  # seconds, of all streams
    tokens: int  # of a stream
    seconds: float


@contextmanager
def stalling_server() -> Iterator[str]:
    """The origin of a server that sends half of each weight file, and then nothing for ever."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            config = b'{"peft_type": "LORA", "r": 8}'
            is_config = self.path.endswith("adapter_config.json")
            if not (is_config or self.path.endswith("adapter_model.safetensors")):
                self.send_error(404)
                return
            nbytes = len(config) if is_config else STALLED_BYTES
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(nbytes))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(config if is_config else bytes(nbytes // 2))
                self.wfile.flush()
                if not is_config:
                    over.wait()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        over.set()
        server.shutdown()


def names(number: int) -> list[str]:
    """Of the local adapters of a pair, the large one first."""
    return [f"large-{number}", *(f"small-{number}-{one}" for one in range(SMALL_ADAPTERS))]


class Bench:
    def __init__(self, engine: Engine, origin: str) -> None:
        self._engine = engine
        self._origin = origin
        self._generator = np.random.default_rng(0)

    def with_loads(self, number: int) -> Run:
        """Until the local adapters of this pair have come in."""
        engine = self._engine
        before = engine.metrics()
        replies = self._streams()
        engine.prefetch(AdapterKey("http", f"{self._origin}/{number}"), "stalling")
        for name in names(number):
            engine.prefetch(AdapterKey("local", name), tenant=name)
        return self._watch(
            replies,
            lambda _: loads(before, engine.latest_metrics())["copies"] >= LOCAL_ADAPTERS,
        )

    def quiet(self, tokens: int) -> Run:
        """As many tokens of each stream, while nothing else happens."""
        return self._watch(self._streams(), lambda done: done >= tokens)

    def _streams(self) -> list[Reply]:
        """Eight streams that all have a token."""
        replies = [
            self._engine.submit(Request(prompt(TOKENS_IN, VOCABULARY, self._generator), MAX_TOKENS))
            for _ in range(STREAMS)
        ]
        while not all(reply.times for reply in replies):
            self._engine.receive(0.1)
        return replies

    def _watch(self, replies: list[Reply], is_over: Callable[[int], bool]) -> Run:
        """is_over is told how many tokens the first stream has got since this was called."""
        first = [len(reply.times) - 1 for reply in replies]
        while not is_over(len(replies[0].times) - 1 - first[0]):
            self._engine.receive(0.1)
            if any(reply.finished for reply in replies):
                raise SystemExit(f"nothing ended within {MAX_TOKENS} tokens of a stream")
        self._engine.cancel_all()
        times = [reply.times[start:] for reply, start in zip(replies, first, strict=True)]
        gaps = [later - earlier for one in times for earlier, later in pairwise(one)]
        return Run(gaps, len(times[0]) - 1, times[0][-1] - times[0][0])


def show(name: str, row: dict[str, Any]) -> None:
    print(
        f"| {name} | {row['load_seconds']:.1f} | "
        + " | ".join(
            f"{row[kind]['p50_ms']:.1f} {row[kind]['p99_ms']:.1f} {row[kind]['max_ms']:.1f}"
            for kind in ("loading", "quiet")
        )
        + f" | {row['p50_ratio']:.3f} | {row['p99_ratio']:.3f} |",
        flush=True,
    )


def row_of(loading: Sequence[Run], quiet: Sequence[Run]) -> dict[str, Any]:
    """The gaps of these runs together."""
    with_loads, without = (
        milliseconds([gap for run in runs for gap in run.gaps]) for runs in (loading, quiet)
    )
    return {
        "load_seconds": sum(run.seconds for run in loading) / len(loading),
        "tokens": sum(run.tokens for run in loading),
        "loading": with_loads,
        "quiet": without,
        "p50_ratio": with_loads["p50_ms"] / without["p50_ms"],
        "p99_ratio": with_loads["p99_ms"] / without["p99_ms"],
    }


def measure(engine: Engine, origin: str, pairs: int, results: Results) -> None:
    bench = Bench(engine, origin)
    bench.quiet(WARM_UP_TOKENS)
    print("| pair | load, s | loading p50 p99 max, ms | quiet | p50 ratio | p99 ratio |")
    print("|---|---|---|---|---|---|")
    loading, quiet = list[Run](), list[Run]()
    for number in range(pairs):
        loading.append(bench.with_loads(number))
        quiet.append(bench.quiet(loading[-1].tokens))
        row = row_of(loading[-1:], quiet[-1:])
        results.add({"pair": number, **row})
        show(str(number), row)
    row = row_of(loading, quiet)
    results.add({"pair": "all", **row})
    show("all", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=6)
    common_options(parser)
    parser.set_defaults(model=MODEL)
    options = parser.parse_args()
    kinds = [
        (name, LARGE if name.startswith("large") else SMALL)
        for number in range(options.pairs)
        for name in names(number)
    ]
    with stalling_server() as origin:
        settings = {
            "http_host": [origin],
            "arena_bytes": 2 << 30,
            "adapter_pool_bytes": 1200 << 20,
            "source_stall_seconds": 600.0,
            "adapter_load_seconds": 600.0,
            "loader_threads": 4,
        }
        scene = Scene(options.model, kinds, settings, options.set, distinct=1)
        with serving(scene) as engine:
            results = Results(engine, "benchmarks.nobody_waits", options.json)
            measure(engine, origin, options.pairs, results)


if __name__ == "__main__":
    main()
