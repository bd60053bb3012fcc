"""The LoRA kernels on a GPU: what they cost beside the base model's linear layers, and how fast.

    python -m benchmarks.lora_kernels [--json FILE] [--parts decode prefill] [--tune]

For the shapes of Llama-3.1-8B in bf16, in CUDA graphs of one launch per layer, each with its own
weights, so that nothing of one launch is in the L2 cache for the next.

* decode: 128 rows; each group of linear layers by cuBLAS, by our kernel without adapters, and with
  so many distinct adapters of rank 16. `extra` is what adapters add to the step, and `share` the
  bytes of their matrices by that time, against the copy bandwidth that was measured before.
* prefill: 4,096 tokens; shrink, expand, and expand with the activation, each alone.

--tune runs decode with other sizes of blocks and launches.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lora_world import Sizes, Timer, Tokens, World, tokens_of
from benchmarks.machine import commit, machine
from gpu_worker.kernels.decode_linears import DecodeLinears, ShrinkTuning
from gpu_worker.kernels.tiles import make_tiles
from gpu_worker.kernels.triton_columns import TILE_ROWS
from gpu_worker.kernels.triton_lora import TritonLora
from gpu_worker.kernels.triton_step import StepTables
from gpu_worker.layers import DOWN, GATE_UP, OUT, QKV, LayerOps
from gpu_worker.layers.linear import PlainLinear
from pipeline.adapter_layout import GROUPS

ROWS, PREFILL_TOKENS = 128, 4096
NAMES = ("qkv", "o", "gate_up", "down")
DISTINCT = (1, 8, 32, 64, 128)
MIXED = (8, 16, 32, 64)


class Variant(NamedTuple):
    """Sizes that differ from the usual ones."""

    shrink: ShrinkTuning = ShrinkTuning()
    changes: Mapping[int, Mapping[str, int]] = {}
    pdl: bool = True


def everywhere(**changes: int) -> dict[int, dict[str, int]]:
    return dict.fromkeys(range(len(GROUPS)), changes)


VARIANTS: dict[str, Variant] = {
    "no dependent launch": Variant(pdl=False),
    "ranks in 3 stages": Variant(changes=everywhere(rank_stages=3)),
    "other blocks": Variant(
        changes={
            GATE_UP: {"block_n": 64, "stages": 5, "warps": 4},
            QKV: {"block_k": 128, "stages": 4},
            OUT: {"block_k": 128, "stages": 4},
            DOWN: {"block_n": 128, "block_k": 64, "splits": 4, "stages": 5},
        }
    ),
    "shrink by 3 programs each": Variant(shrink=ShrinkTuning(programs=132 * 3)),
    "shrink in 2 stages": Variant(shrink=ShrinkTuning(stages=2)),
}


class Bench:
    def __init__(self) -> None:
        self.device = torch.device("cuda")
        ranks = [16] * ROWS + [MIXED[i % len(MIXED)] for i in range(64)]
        self.world = World(Sizes(), ranks, torch.bfloat16, self.device)
        self.timer = Timer(self.device)
        self.copy = self.timer.copy_bandwidth()
        self.figures: dict[str, Any] = {
            "commit": commit(),
            "machine": machine(),
            "device": torch.cuda.get_device_name(),
            "copy_bytes_per_second": self.copy,
        }
        print(
            f"{self.figures['device']}, commit {commit()}: "
            f"copies {self.copy / 1e12:.2f} TB/s, read and written"
        )

    # --- decode ---

    def decode(self, tune: bool) -> None:
        steps = [tokens_of(f"{n}", range(n), ROWS) for n in DISTINCT]
        steps.append(tokens_of("64 mixed", range(ROWS, ROWS + 64), ROWS))
        variants = {"usual": Variant()} | (VARIANTS if tune else {})
        print(f"\n## Decode, {ROWS} rows: us per layer")
        print("| group | sizes | cuBLAS | base |", " | ".join(step.name for step in steps), "|")
        print("|---" * (4 + len(steps)) + "|")
        layers: dict[str, list[float]] = {}
        for group, name in enumerate(NAMES):
            weights = self._base_weights(group)
            x = torch.randn((ROWS, weights[0].weight.shape[1]), device=self.device).bfloat16()
            cublas = self._per_layer(lambda w=weights, x=x: [F.linear(x, one.weight) for one in w])  # type: ignore[misc]
            for title, variant in variants.items():
                times = self._times(variant, group, weights, x, steps)
                of_variant = layers.setdefault(title, [0.0] * (2 + len(steps)))
                for index, taken in enumerate([cublas, *times]):
                    of_variant[index] += taken
                self._row(name, title, [cublas, *times])
        for title, times in layers.items():
            self._row("all", title, times)
        self.figures["decode_us"] = {
            title: [1e6 * taken for taken in times] for title, times in layers.items()
        }
        self._shares(steps, layers["usual"])

    def _row(self, name: str, title: str, seconds: list[float]) -> None:
        cells = " | ".join(f"{1e6 * taken:.1f}" for taken in seconds)
        print(f"| {name} | {title} | {cells} |", flush=True)

    def _shares(self, steps: list[Tokens], times: list[float]) -> None:
        base = times[1]
        print(
            "\n| adapters | extra, us per layer | of base | TB/s of their bytes | share of copy |"
        )
        print("|---|---|---|---|---|")
        rows = {}
        for step, taken in zip(steps, times[2:], strict=True):
            ranks = sum(self.world.slot_ranks[slot] for slot in step.slots)
            features = sum(shape.in_features + shape.out_features for shape in self.world.shapes)
            rate = ranks * features * 2 / (taken - base)
            rows[step.name] = {"base_share": base / taken, "bytes_per_second": rate}
            print(
                f"| {step.name} | {1e6 * (taken - base):.1f} | {base / taken:.3f} "
                f"| {rate / 1e12:.2f} | {rate / self.copy:.2f} |"
            )
        self.figures["decode"] = rows

    def _base_weights(self, group: int) -> list[PlainLinear]:
        shapes = [self.world.shapes[module] for module in GROUPS[group]]
        size = (sum(shape.out_features for shape in shapes), shapes[0].in_features)
        return [
            PlainLinear(torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_(), None)
            for _ in range(self.world.sizes.layers)
        ]

    def _times(
        self,
        variant: Variant,
        group: int,
        weights: list[PlainLinear],
        x: Tensor,
        steps: list[Tokens],
    ) -> list[float]:
        linears = DecodeLinears(
            tables=self.world.tables,
            shapes=self.world.shapes,
            layers=self.world.sizes.layers,
            rows=ROWS,
            pdl=variant.pdl,
            shrink=variant.shrink,
            changes=variant.changes,
        )
        tiles = torch.zeros((ROWS, 3), dtype=torch.int32, device=self.device)
        count = torch.zeros(1, dtype=torch.int32, device=self.device)

        def run(lora: bool) -> None:
            plan = linears.plan(tiles, count) if lora else linears.base()
            for layer, linear in enumerate(weights):
                if group == GATE_UP:
                    plan.gated(linear, x, layer, NO_OPS)
                else:
                    plan.apply(linear, x, layer, group)

        times = [self._per_layer(lambda: run(False))]
        graph = self.timer.graph(lambda: run(True))
        for step in steps:
            made = make_tiles(step.segments, TILE_ROWS)
            tiles[: len(made)].copy_(torch.from_numpy(made))
            count.fill_(len(made))
            times.append(self.timer.seconds(graph, cold=False) / self.world.sizes.layers)
        return times

    def _per_layer(self, work: Callable[[], object]) -> float:
        graph = self.timer.graph(work)
        return self.timer.seconds(graph, cold=False) / self.world.sizes.layers

    # --- prefill ---

    def prefill(self) -> None:
        print(f"\n## Prefill, {PREFILL_TOKENS} tokens: us per launch (TB/s, TFLOP/s)")
        lora = self.world.lora(tokens=PREFILL_TOKENS, sequences=64)
        steps = [tokens_of(f"{n}", range(n), PREFILL_TOKENS) for n in (1, 8, 32)]
        steps.append(tokens_of("32 mixed", range(ROWS, ROWS + 32), PREFILL_TOKENS))
        found: dict[str, dict[str, float]] = {}
        for group, name in enumerate(NAMES):
            for kind, launch in self._launches(lora, group).items():
                for step in steps:
                    made = torch.from_numpy(make_tiles(step.segments, lora.tuning.tile_height))
                    count = torch.tensor([len(made)], dtype=torch.int32, device=self.device)
                    tables = lora.prepare(made.to(self.device), count)
                    taken = self._per_layer(
                        lambda launch=launch, tables=tables: [  # type: ignore[misc]
                            launch(tables, layer) for layer in range(self.world.sizes.layers)
                        ]
                    )
                    nbytes, flops = self._work(step, group, kind)
                    found.setdefault(f"{name} {kind}", {})[step.name] = taken * 1e6
                    print(
                        f"{name + ' ' + kind:20} {step.name:9} {taken * 1e6:7.1f} us "
                        f"{nbytes / taken / 1e12:5.2f} TB/s {flops / taken / 1e12:6.1f} TFLOP/s"
                    )
        self.figures["prefill_us"] = found

    def _launches(
        self, lora: TritonLora, group: int
    ) -> dict[str, Callable[[StepTables, int], None]]:
        shapes = [self.world.shapes[module] for module in GROUPS[group]]
        x = torch.randn((PREFILL_TOKENS, shapes[0].in_features), device=self.device).bfloat16()
        out = sum(shape.out_features for shape in shapes)
        y = torch.zeros((PREFILL_TOKENS, out), dtype=torch.bfloat16, device=self.device)
        launches: dict[str, Callable[[StepTables, int], None]] = {
            "shrink": lambda tables, layer: lora.shrink(x, tables, layer, group),
            "expand": lambda tables, layer: lora.expand(y, tables, layer, group),
        }
        if group == GATE_UP:
            act = torch.empty_like(y[:, : out // 2]).contiguous()
            launches["expand silu"] = lambda tables, layer: lora.expand_silu(y, act, tables, layer)
        return launches

    def _work(self, tokens: Tokens, group: int, kind: str) -> tuple[float, float]:
        """Bytes that must be moved, and operations."""
        shapes = [self.world.shapes[module] for module in GROUPS[group]]
        total_in, out = shapes[0].in_features, sum(shape.out_features for shape in shapes)
        ranks = sum(self.world.slot_ranks[slot] for slot in tokens.slots)
        per_token = sum(
            (end - start) * self.world.slot_ranks[slot] for start, end, slot in tokens.segments
        )
        if kind == "shrink":
            nbytes = (ranks * len(shapes) + tokens.tokens) * total_in * 2
            return nbytes, 2 * per_token * len(shapes) * total_in
        y_passes = 1.5 if kind == "expand silu" else 2
        return (ranks + y_passes * tokens.tokens) * out * 2, 2 * per_token * out


NO_OPS: LayerOps = None  # type: ignore[assignment]  # DecodePlan needs none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--parts", nargs="+", choices=("decode", "prefill"))
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    bench = Bench()
    parts = options.parts or ("decode", "prefill")
    if "decode" in parts:
        bench.decode(options.tune)
    if "prefill" in parts:
        bench.prefill()
    if options.json:
        options.json.write_text(json.dumps(bench.figures, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
