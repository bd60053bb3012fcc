"""More adapters than the device holds: throughput, time to first token, and who notices loads.

    python -m benchmarks.gpu_adapters [--parts throughput first_token gaps]
        [--counts 1 8 32 128 512 1000 2000] [--set NAME=VALUE ...] [--json FILE]

The pipeline of benchmarks/gpu_throughput.py with a pool for 128 adapters of rank 16 and an arena
for 192. The adapters lie on disk, in fewer weight files than adapters: the others are hard links.

* throughput: requests of 128 tokens in and out, always 256 of them under way for 128 rows, over N
  adapters that are equally popular, or popular like 1/k. Counted from the end of the first 256 to
  that of the last; what was loaded meanwhile is beside it.
* first_token: one request at a time, on a server that does nothing else, for the base model and for
  adapters in each tier: resident in the pool, in the host arena, in the page cache, and on disk
  (the file's pages are dropped first, where the file system does so).
* gaps: the time between two tokens of 64 streams whose adapters are resident, while others are
  loaded without a request for them (so that no prefill is in the way), and while short requests
  come for resident adapters or for such as must be loaded. `p99 to quiet` is against the first run
  in which nothing else happens; the last row is such a run again.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.adapters import AdapterKind
from benchmarks.engine import Engine, Metrics, Reply, Request
from benchmarks.harness import Results, Scene, common_options, prompt, serving
from benchmarks.models import make_model
from pipeline.arena import ALIGNMENT
from pipeline.messages import AdapterKey
from pipeline.model_config import ModelConfig, read_model_config

KIND = AdapterKind()
PARTS = ("throughput", "first_token", "gaps")
COUNTS = (1, 8, 32, 128, 512, 1000, 2000)
POPULARITIES = ("uniform", "power law")
WEIGHTS = "adapter_model.safetensors"
SETTLE_SECONDS = 120.0
MARGIN = 2  # adapters


class Tiers(NamedTuple):
    """Which adapters lie where, by number, once all of them have been asked for in order."""

    pool: int  # adapters that the device holds
    samples: int  # requests that are measured in each tier
    together: int  # adapters that are asked for at once on the way, so that order is not exact

    @property
    def arena(self) -> int:
        """Adapters that the arena holds: those of the pool, the samples beside it, a margin for
        those that are asked for at once and for those whose leases come back late."""
        return self.pool + self.samples + 2 * self.together + MARGIN

    @property
    def total(self) -> int:
        """Enough that two tiers of samples are in no memory of ours."""
        return self.arena + 2 * self.samples + 2 * self.together

    def resident(self) -> range:
        return range(self.total - self.samples, self.total)

    def staged(self) -> range:
        first = self.total - self.pool - self.together - self.samples
        return range(first, first + self.samples)

    def cached(self) -> range:
        return range(self.samples)

    def on_disk(self) -> range:
        return range(self.samples, 2 * self.samples)


class Sizes(NamedTuple):
    """How large the parts are. Tokens, requests, streams."""

    in_flight: int
    rows: int
    ends: int  # requests that are counted
    tokens_in: int
    tokens_out: int
    streams: int  # of the gaps
    stream_tokens: int


class Bench:
    """An engine, and what every part needs."""

    def __init__(
        self, engine: Engine, config: ModelConfig, tiers: Tiers, sizes: Sizes, results: Results
    ) -> None:
        self.engine = engine
        self.config = config
        self.tiers = tiers
        self.sizes = sizes
        self.results = results
        self.generator = np.random.default_rng(0)

    def request(self, adapter: int | None, tokens_in: int, tokens_out: int) -> Request:
        tokens = prompt(tokens_in, self.config.vocabulary, self.generator)
        return Request(tokens, tokens_out, None if adapter is None else name_of(adapter))

    def touch(self, adapters: Sequence[int]) -> None:
        """Have them all resident once, nearly in this order."""
        step = self.tiers.together
        for first in range(0, len(adapters), step):
            group = adapters[first : first + step]
            self.engine.run([self.request(adapter, 8, 1) for adapter in group])

    def settle(self) -> Metrics:
        """Wait until no load is under way that was asked for."""
        deadline = time.monotonic() + SETTLE_SECONDS
        before = self.engine.metrics()
        while time.monotonic() < deadline:
            after = self.engine.metrics()
            if not loads(before, after)["loads"]:
                return after
            before = after
        raise SystemExit(f"adapters are still being loaded after {SETTLE_SECONDS:.0f} s")


def name_of(adapter: int) -> str:
    return f"adapter-{adapter}"


def loads(before: Metrics, after: Metrics) -> dict[str, float]:
    """Adapters that were staged, read from files, and copied to the device."""
    staged = after.since(before, "adapter_loader", "loradex_adapter_loads_total", outcome="staged")
    packed = after.since(
        before, "adapter_loader", "loradex_adapter_load_stage_seconds_count", stage="pack"
    )
    copied = after.since(before, "gpu_worker", "loradex_adapter_copies_total")
    return {"loads": staged or 0.0, "reads": packed or 0.0, "copies": copied or 0.0}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = (1e3 * float(np.percentile(seconds, share)) for share in (50, 90, 99))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": 1e3 * max(seconds)}


# --- throughput ---


def popularity(kind: str, adapters: int) -> NDArray[np.float64]:
    """The share of requests that each adapter gets."""
    weights = np.ones(adapters) if kind == "uniform" else 1 / np.arange(1.0, adapters + 1)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def throughput(bench: Bench, counts: Sequence[int]) -> None:
    print("| adapters | popularity | tokens/s | of one | first token p50, p99, ms | read, 1/s |")
    print("|---|---|---|---|---|---|")
    one: float | None = None
    for adapters in counts:
        for kind in POPULARITIES if adapters > 1 else POPULARITIES[:1]:
            row: dict[str, Any] = {"part": "throughput", "adapters": adapters, "popularity": kind}
            row |= steady_state(bench, popularity(kind, adapters))
            one = row["tokens_per_second"] if adapters == 1 else one
            row["share_of_one"] = None if one is None else row["tokens_per_second"] / one
            bench.results.add(row)
            share = "" if one is None else f"{row['share_of_one']:.3f}"
            first = row["first_token"]
            print(
                f"| {adapters} | {kind} | {row['tokens_per_second']:.0f} | {share} "
                f"| {first['p50_ms']:.0f}, {first['p99_ms']:.0f} "
                f"| {row['reads'] / row['seconds']:.1f} |",
                flush=True,
            )


def steady_state(bench: Bench, shares: NDArray[np.float64]) -> dict[str, Any]:
    """Requests under way all the time; counted once as many have ended as are under way."""
    sizes, engine = bench.sizes, bench.engine
    replies: list[Reply] = []

    def submit() -> None:
        adapter = int(bench.generator.choice(len(shares), p=shares))
        replies.append(engine.submit(bench.request(adapter, sizes.tokens_in, sizes.tokens_out)))

    def run(ends: int) -> None:
        while ends > 0:
            for _ in engine.receive(0.1):
                submit()
                ends -= 1

    for _ in range(sizes.in_flight):
        submit()
    run(sizes.in_flight)
    is_current = engine.reporting()
    while not is_current():  # what was counted so far is not of what is measured
        run(1)
        engine.latest_metrics()
    before, start = engine.latest_metrics(), time.monotonic()
    run(sizes.ends)
    after, end = engine.latest_metrics(), time.monotonic()
    engine.cancel_all()
    bench.settle()
    tokens = sum(start <= arrived < end for reply in replies for arrived in reply.times)
    first = [
        reply.first_token_seconds
        for reply in replies
        if reply.times and start <= reply.times[0] < end
    ]
    return {
        "seconds": end - start,
        "tokens_per_second": tokens / (end - start),
        "first_token": milliseconds(first),
        **loads(before, after),
    }


# --- time to first token ---


def first_token(bench: Bench) -> None:
    print("\n| tier | first token p50, ms | p90 | p99 | above resident | read | copied |")
    print("|---|---|---|---|---|---|---|")
    tiers, engine = bench.tiers, bench.engine
    bench.touch(range(tiers.total))
    resident: float | None = None
    measured: list[tuple[str, Sequence[int | None]]] = [
        ("base model", [None] * tiers.samples),
        ("resident", tiers.resident()),
        ("resident", tiers.resident()),  # the first time warms what is made per adapter
        ("host arena", tiers.staged()),
        ("page cache", tiers.cached()),
        ("disk", tiers.on_disk()),
    ]
    for tier, adapters in measured:
        if tier == "disk":
            for adapter in adapters:
                assert adapter is not None
                drop_pages(Path(engine.settings.adapter_root[0]) / name_of(adapter) / WEIGHTS)
        before = engine.metrics()
        replies = [
            engine.run([bench.request(adapter, bench.sizes.tokens_in, 2)])[0]
            for adapter in adapters
        ]
        changes = loads(before, engine.metrics())
        seconds = [reply.first_token_seconds for reply in replies]
        if tier == "resident":
            resident = statistics.median(seconds)
        above = None if resident is None else 1e3 * (statistics.median(seconds) - resident)
        row = {"part": "first_token", "tier": tier, "samples": len(seconds)}
        row |= {"above_resident_ms": above, **milliseconds(seconds), **changes}
        bench.results.add(row)
        print(
            f"| {tier} | {row['p50_ms']:.2f} | {row['p90_ms']:.2f} | {row['p99_ms']:.2f} "
            f"| {'' if above is None else f'{above:.2f}'} "
            f"| {changes['reads']:.0f} | {changes['copies']:.0f} |",
            flush=True,
        )


def drop_pages(path: Path) -> None:
    """Take a file out of the page cache; nothing happens where it lies in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- gaps ---


class Disturbance(NamedTuple):
    """What happens while the streams run."""

    name: str
    per_second: float
    act: Callable[[], object]


def gaps(bench: Bench, host_rate: float, file_rate: float, files: int) -> None:
    print("\n| meanwhile | per s | gap p50, ms | p99 | max | p99 to quiet | read | copied |")
    print("|---|---|---|---|---|---|---|---|")
    sizes, pool, engine = bench.sizes, bench.tiers.pool, bench.engine
    streams = range(sizes.streams)
    staged = range(sizes.streams, pool + pool // 4)  # more than fit beside the streams
    bench.touch([*staged, *streams])
    idle = staged[-(pool // 4) :]  # resident at first, and not of a stream
    in_turn = cycle(staged)
    half = (staged.stop + files) // 2  # so that the first to be loaded leave some to be asked for
    unseen, unasked = cycle(range(staged.stop, half)), cycle(range(half, files))

    def ask(adapters: Iterator[int]) -> Callable[[], object]:
        return lambda: engine.submit(bench.request(next(adapters), 16, 1))

    def load(adapters: Iterator[int]) -> Callable[[], object]:
        return lambda: engine.prefetch(AdapterKey("local", name_of(next(adapters))))

    quiet = Disturbance("nothing", 0, lambda: None)
    baseline: list[float] = []
    for disturbance in (
        quiet,
        Disturbance("requests, resident", host_rate, ask(cycle(idle))),
        Disturbance("loads from the host arena", host_rate, load(in_turn)),
        Disturbance("requests, from the host arena", host_rate, ask(in_turn)),
        Disturbance("loads from the page cache", file_rate, load(unseen)),
        Disturbance("requests, from the page cache", file_rate, ask(unasked)),
        quiet,
    ):
        if disturbance.name == "requests, resident":
            bench.touch([*idle, *streams])
        row = disturbed(bench, streams, disturbance)
        if disturbance is quiet:
            baseline.append(row["p99_ms"])
        row["p99_to_quiet"] = row["p99_ms"] / baseline[0]
        bench.results.add(row)
        print(
            f"| {disturbance.name} | {disturbance.per_second:g} | {row['p50_ms']:.2f} "
            f"| {row['p99_ms']:.2f} | {row['max_ms']:.2f} | {row['p99_to_quiet']:.3f} "
            f"| {row['reads']:.0f} | {row['copies']:.0f} |",
            flush=True,
        )


def cycle(adapters: range) -> Iterator[int]:
    return (adapters[index % len(adapters)] for index in count())


def disturbed(bench: Bench, streams: range, disturbance: Disturbance) -> dict[str, Any]:
    """The gaps of all streams while all of them decode."""
    engine, sizes = bench.engine, bench.sizes
    before = bench.settle()
    replies = [
        engine.submit(bench.request(adapter, sizes.tokens_in, sizes.stream_tokens))
        for adapter in streams
    ]
    while not all(reply.times for reply in replies):
        engine.receive(0.1)
    start = due = time.monotonic()
    while all(reply.finished is None for reply in replies):
        wait = 0.1
        if disturbance.per_second:
            while due <= time.monotonic():
                disturbance.act()
                due += 1 / disturbance.per_second
            wait = max(0.0, due - time.monotonic())
        engine.receive(min(wait, 0.1))
    end = time.monotonic()
    engine.finish()
    found = [
        later - earlier
        for reply in replies
        for earlier, later in pairwise(arrived for arrived in reply.times if start <= arrived < end)
    ]
    return {
        "part": "gaps",
        "meanwhile": disturbance.name,
        "per_second": disturbance.per_second,
        "streams": len(replies),
        "seconds": end - start,
        **milliseconds(found),
        **loads(before, bench.settle()),
    }


# --- the server ---


def settings_for(tiers: Tiers, sizes: Sizes, config: ModelConfig) -> dict[str, Any]:
    """Room for exactly so many adapters."""
    nbytes = KIND.nbytes(config, 4 if config.dtype == "float32" else 2)
    return {
        "rows": sizes.rows,
        "step_tokens": max(4096, sizes.rows),
        "adapter_pool_bytes": tiers.pool * -(-nbytes // 256) * 256,
        "adapter_slots": tiers.pool,
        "arena_bytes": tiers.arena * -(-nbytes // ALIGNMENT) * ALIGNMENT,
    }


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--pool", type=int, default=128, help="adapters that the device holds")
    parser.add_argument("--distinct", type=int, default=64, help="weight files")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--ends", type=int, default=512, help="requests that are counted")
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=800)
    parser.add_argument("--host-rate", type=float, default=20.0, help="loads per second")
    parser.add_argument("--file-rate", type=float, default=8.0, help="loads per second")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to read from"
    )
    common_options(parser)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(given)
    with tempfile.TemporaryDirectory() as name:
        config = read_model_config(make_model(options.model, Path(name)))
    tiers = Tiers(options.pool, options.pool // 4, max(1, options.pool // 8))
    sizes = Sizes(
        in_flight=options.in_flight,
        rows=options.rows,
        ends=options.ends,
        tokens_in=options.tokens_in,
        tokens_out=options.tokens_out,
        streams=options.streams,
        stream_tokens=options.stream_tokens,
    )
    files = max(*options.counts, tiers.total)
    scene = Scene(
        model=options.model,
        kinds=[(name_of(number), KIND) for number in range(files)],
        settings=settings_for(tiers, sizes, config),
        changes=options.set,
        distinct=options.distinct,
        parent=options.folder,
    )
    with serving(scene) as engine:
        results = Results(engine, "benchmarks.gpu_adapters", options.json)
        bench = Bench(engine, config, tiers, sizes, results)
        if "throughput" in options.parts:
            throughput(bench, options.counts)
        if "first_token" in options.parts:
            first_token(bench)
        if "gaps" in options.parts:
            gaps(bench, options.host_rate, options.file_rate, files)


if __name__ == "__main__":
    main()
