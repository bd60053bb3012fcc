"""The LoRA kernels on a GPU: right, how fast, and what they cost in a decode step.

    PYTHONPATH=. python benchmarks/lora_kernels.py [--json FILE] [--parts right,decode,...]

For the shapes of Llama-3.1-8B in bf16. `decode` and `prefill` time the kernels alone, in CUDA
graphs of one launch per layer, with a cold L2 cache before each replay. `model` puts them into
a decode step without attention. `tune` times many sizes of blocks and launches.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_model import Design, Model
from benchmarks.lora_world import Sizes, Step, Timer, Tokens, World, tokens_of
from benchmarks.machine import commit
from gpu_worker.kernels.reference import expand, shrink
from gpu_worker.kernels.triton_lora import DECODE, GATE_UP, PREFILL, QKV, TritonLora, Tuning
from pipeline.adapter_layout import GROUPS

ROWS, PREFILL_TOKENS = 128, 4096
NAMES = ("qkv", "o", "gate_up", "down")
DISTINCT = (1, 8, 32, 64, 128)
MIXED = (8, 16, 32, 64)
PARTS = ("right", "decode", "prefill", "model")
DESIGNS: dict[str, tuple[Design, Tuning]] = {
    "separate": (Design(), DECODE),
    "separate, atomic": (Design(), DECODE._replace(atomic=True)),
    "separate, pdl": (Design(), DECODE._replace(pdl=True)),
    "beside": (Design(beside=True), DECODE),
    "silu": (Design(silu=True), DECODE),
    "silu rotary": (Design(silu=True, rotary=True), DECODE),
    "silu rotary, beside": (Design(silu=True, rotary=True, beside=True), DECODE),
    "all fused": (Design(silu=True, rotary=True, residual=True), DECODE),
    "all fused, beside": (Design(beside=True, silu=True, rotary=True, residual=True), DECODE),
    "all fused, pdl": (
        Design(silu=True, rotary=True, residual=True),
        DECODE._replace(pdl=True),
    ),
    "all fused, beside, pdl": (
        Design(beside=True, silu=True, rotary=True, residual=True),
        DECODE._replace(pdl=True),
    ),
    "all fused, atomic, pdl": (
        Design(silu=True, rotary=True, residual=True),
        DECODE._replace(pdl=True, atomic=True),
    ),
}


def decode_steps() -> list[Tokens]:
    steps = [tokens_of(f"{n} distinct", range(n), ROWS) for n in DISTINCT]
    mixed = range(ROWS, ROWS + 64)
    large = [*range(63), ROWS + 64]
    return [
        *steps,
        tokens_of("64 of 8/16/32/64", mixed, ROWS),
        tokens_of("63 and a rank 256", large, ROWS),
    ]


def make_world(device: torch.device) -> World:
    """Rank 16 in the slots below ROWS, then mixed ones, then one of rank 256, one of 512."""
    ranks = [16] * ROWS + [MIXED[i % len(MIXED)] for i in range(64)] + [256, 512]
    return World(Sizes(), ranks, torch.bfloat16, device)


class Bench:
    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.world = make_world(self.device)
        self.timer = Timer(self.device)
        self.figures: dict[str, Any] = {"commit": commit()}
        self.copy = self.timer.copy_bandwidth()
        name = torch.cuda.get_device_name()
        self.figures["machine"] = name
        self.figures["copy_bytes_per_second"] = self.copy
        print(f"{name}, commit {commit()}: copies {self.copy / 1e12:.2f} TB/s, read and written")

    def right(self) -> None:
        """Each tuning against the reference; y starts as zeros, so that only LoRA is compared."""
        tunings = {
            "decode": DECODE,
            "decode, atomic": DECODE._replace(atomic=True),
            "decode, pdl": DECODE._replace(pdl=True),
            "prefill": PREFILL,
        }
        print("\n## Largest relative error of B A x, by norm, over groups and steps")
        worst = {}
        for name, tuning in tunings.items():
            lora = self.world.lora(tuning, tokens=ROWS, sequences=ROWS)
            steps = [tokens_of("one", [3], ROWS), *decode_steps()[-2:]]
            worst[name] = max(
                self._error(lora, tokens, group) for tokens in steps for group in range(len(GROUPS))
            )
            print(f"{name:20} {worst[name]:.5f}")
        self.figures["relative_error"] = worst

    def _error(self, lora: TritonLora, tokens: Tokens, group: int) -> float:
        world, layer = self.world, 5
        x, y = self._tensors(group, tokens.tokens)
        expected = torch.zeros_like(y, dtype=torch.float32)
        for start, end, slot in tokens.segments:
            weights = world.weights(slot, layer, group)
            expand(expected[start:end], shrink(x[start:end], weights.lora_a), weights.lora_b)
        step = Step(lora, world, tokens.tokens)
        step.put(tokens)
        tables = step.prepare()
        lora.shrink(x, tables, layer, group)
        lora.expand(y, tables, layer, group)
        return float((y.float() - expected).norm() / expected.norm())

    def _tensors(self, group: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = [self.world.shapes[module] for module in GROUPS[group]]
        x = torch.randn((tokens, shapes[0].in_features), dtype=self.world.dtype, device=self.device)
        out = sum(shape.out_features for shape in shapes)
        return x, torch.zeros((tokens, out), dtype=self.world.dtype, device=self.device)

    def decode(self) -> None:
        print(f"\n## Decode, {ROWS} rows: us per launch (TB/s, share of copy)")
        lora = self.world.lora(DECODE, tokens=ROWS, sequences=ROWS)
        self.figures["decode"] = self._alone(lora, decode_steps(), ROWS)

    def prefill(self) -> None:
        print(
            f"\n## Prefill, {PREFILL_TOKENS} tokens: us per launch (TB/s, share of copy, TFLOP/s)"
        )
        lora = self.world.lora(PREFILL, tokens=PREFILL_TOKENS, sequences=64)
        steps = [tokens_of(f"{n} segments", range(n), PREFILL_TOKENS) for n in (1, 8, 32)]
        steps.append(tokens_of("32 of 8/16/32/64", range(ROWS, ROWS + 32), PREFILL_TOKENS))
        self.figures["prefill"] = self._alone(lora, steps, PREFILL_TOKENS)

    def _alone(
        self, lora: TritonLora, steps: list[Tokens], tokens: int
    ) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {step.name: {} for step in steps}
        step = Step(lora, self.world, tokens)
        for group, name in enumerate(NAMES):
            x, y = self._tensors(group, tokens)
            for kind, launch in self._launches(lora, x, y, group).items():
                seconds = self._per_launch(step, steps, launch)
                print(f"{name} {kind}")
                for tokens_, taken in zip(steps, seconds, strict=True):
                    nbytes, flops = self._work(tokens_, group, kind)
                    rate = nbytes / taken
                    print(
                        f"  {tokens_.name:20} {taken * 1e6:7.2f} us  {rate / 1e12:5.2f} TB/s "
                        f"{rate / self.copy:5.2f}  {flops / taken / 1e12:6.1f} TFLOP/s"
                    )
                    rows[tokens_.name][f"{name} {kind} us"] = taken * 1e6
                    rows[tokens_.name][f"{name} {kind} bytes"] = nbytes
        for row in rows.values():
            for kind in ("shrink", "expand"):
                taken = sum(row[f"{name} {kind} us"] for name in NAMES) / 1e6
                rate = sum(row[f"{name} {kind} bytes"] for name in NAMES) / taken
                row[f"{kind} share of copy"] = rate / self.copy
        print("all groups, share of copy bandwidth: shrink, expand")
        for name, row in rows.items():
            print(
                f"  {name:20} {row['shrink share of copy']:.2f} {row['expand share of copy']:.2f}"
            )
        return rows

    def _launches(
        self, lora: TritonLora, x: torch.Tensor, y: torch.Tensor, group: int
    ) -> dict[str, Callable[[Any, int], None]]:
        launches: dict[str, Callable[[Any, int], None]] = {
            "shrink": lambda tables, layer: lora.shrink(x, tables, layer, group),
            "expand": lambda tables, layer: lora.expand(y, tables, layer, group),
        }
        if group == GATE_UP:
            act = torch.empty_like(y[:, : y.shape[1] // 2]).contiguous()
            launches["expand silu"] = lambda tables, layer: lora.expand_silu(y, act, tables, layer)
        return launches

    def _per_launch(
        self, step: Step, steps: Iterable[Tokens], launch: Callable[[Any, int], None]
    ) -> list[float]:
        layers = self.world.sizes.layers
        tables = step.prepare()

        def work() -> None:
            for layer in range(layers):
                launch(tables, layer)

        graph = self.timer.graph(work)
        seconds = []
        for tokens in steps:
            step.put(tokens)
            step.prepare()
            seconds.append(self.timer.seconds(graph) / layers)
        return seconds

    def _work(self, tokens: Tokens, group: int, kind: str) -> tuple[float, float]:
        """Bytes that must be moved, and operations."""
        shapes = [self.world.shapes[module] for module in GROUPS[group]]
        size = self.world.dtype.itemsize
        total_in, out = shapes[0].in_features, sum(shape.out_features for shape in shapes)
        ranks = sum(self.world.slot_ranks[slot] for slot in tokens.slots)
        per_token = sum(
            (end - start) * self.world.slot_ranks[slot] for start, end, slot in tokens.segments
        )
        if kind == "shrink":
            nbytes = (ranks * len(shapes) + tokens.tokens) * total_in * size
            return nbytes, 2 * per_token * len(shapes) * total_in
        y_passes = 1.5 if kind == "expand silu" else 2
        return (ranks + y_passes * tokens.tokens) * out * size, 2 * per_token * out

    def model(self) -> None:
        """Shares of the step without LoRA."""
        model = Model(self.world.sizes, ROWS, self.world.dtype, self.device)
        base = self.timer.seconds(self.timer.graph(model.base), cold=False)
        print(f"\n## Decode step without attention, {ROWS} rows: base {base * 1e3:.3f} ms")
        print("share of it with 0, 1, 8, 32, 64, 128 distinct adapters, mixed, one of rank 256")
        steps = [tokens_of("base", [], ROWS), *decode_steps()]
        rows: dict[str, list[float]] = {}
        expected: dict[str, torch.Tensor] = {}
        for name, (design, tuning) in DESIGNS.items():
            lora = self.world.lora(tuning, tokens=ROWS, sequences=ROWS)
            step = Step(lora, self.world, ROWS)
            step.put(steps[0])
            graph = self.timer.graph(lambda d=design, k=lora, s=step: model.lora(d, k, s))  # type: ignore[misc]
            shares, errors = [], []
            for tokens in steps:
                step.put(tokens)
                shares.append(base / self.timer.seconds(graph, cold=False))
                x = model.x.float()
                of_step = expected.setdefault(tokens.name, x)
                errors.append(float((x - of_step).norm() / of_step.norm()))
            rows[name] = shares
            print(f"{name:24}", *(f"{share:.3f}" for share in shares), f"({max(errors):.3f})")
        print("in brackets: largest difference of the residual stream from the first design's")
        self.figures["model"] = {"base_seconds": base, "shares": rows}

    def tune(self) -> None:
        """Launches of gate_up and qkv with other sizes, for few, many, and mixed adapters."""
        steps = decode_steps()
        steps = [steps[0], steps[1], steps[3], steps[4], steps[5]]
        print("\n## Tuning: us per launch for", ", ".join(step.name for step in steps))
        for group in (QKV, GATE_UP):
            for kind in ("shrink", "expand"):
                print(NAMES[group], kind)
                for changes in SHRINKS if kind == "shrink" else EXPANDS:
                    lora = self.world.lora(DECODE._replace(**changes), tokens=ROWS, sequences=ROWS)
                    x, y = self._tensors(group, ROWS)
                    launch = self._launches(lora, x, y, group)[kind]
                    step = Step(lora, self.world, ROWS)
                    seconds = self._per_launch(step, steps, launch)
                    print(*(f"{taken * 1e6:7.2f}" for taken in seconds), changes)


SHRINKS: list[dict[str, Any]] = [
    {"shrink_warps": warps, "k_block": k_block, "shrink_programs": 132 * each, "splits": splits}
    for warps, k_block in ((1, 128), (2, 256), (4, 256), (4, 512))
    for each, splits in ((4, 8), (8, 8), (8, 16), (12, 4))
]
EXPANDS: list[dict[str, Any]] = [
    {
        "expand_warps": warps,
        "out_block": block,
        "expand_programs": 132 * each,
        "expand_stages": stages,
    }
    for warps, block in ((2, 64), (4, 64), (4, 128), (4, 256), (8, 256))
    for each in (6, 12)
    for stages in (1, 2)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="of right,decode,prefill,model,tune"
    )
    options = parser.parse_args()
    bench = Bench()
    for part in options.parts.split(","):
        start = time.perf_counter()
        getattr(bench, part)()
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)
    if options.json:
        options.json.write_text(json.dumps(bench.figures, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
