"""The linear layers of decode steps for CUDA against the reference, adapters included."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.decode_linears import DecodeLinears, DecodePlan, ShrinkTuning
from gpu_worker.kernels.reference import Reference
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.tiles import make_tiles
from gpu_worker.kernels.triton_columns import TILE_ROWS
from gpu_worker.layers import DOWN, GATE_UP, OUT, QKV
from gpu_worker.layers.linear import PlainLinear
from gpu_worker.layers.torch_ops import TorchOps
from pipeline.adapter_layout import GROUPS
from tests.gpu_worker.lora import make_pool, make_shapes
from tests.gpu_worker.triton_device import DEVICE

LAYERS = 3
SHAPES = make_shapes(hidden=96, kv=32, intermediate=160)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if DEVICE.type == "cuda":  # fp32 is another path's there
    TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPE = next(iter(TOLERANCE))
PDL = DEVICE.type == "cuda"
RANKS = [[8] * 7, [16, 0, 3, 40, 0, 24, 1], [0] * 7, [33] * 7]
RUNS = [(0, 1), (-1, 2), (1, 18), (2, 3), (-1, 1), (3, 2), (0, 1), (0, 1)]


class Case:
    """Adapters in a pool, and a step of theirs.

    ranks  [slot][module] in all layers but the first, where the adapters have only q and down
    runs   (slot, rows); the slot -1 is the base model
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[int]] = RANKS,
        runs: Sequence[tuple[int, int]] = RUNS,
        *,
        dtype: torch.dtype = DTYPE,
        shrink: ShrinkTuning | None = None,
        processors: int = 4,
    ) -> None:
        self.dtype = dtype
        all_ranks = [[r[0], 0, 0, 0, 0, 0, r[6], *r, *r] for r in ranks]
        pool = make_pool(all_ranks, shapes=SHAPES, dtype=dtype)
        self.adapters = pool.adapters
        self.packed = pool._pool.to(DEVICE)
        tables = AdapterTables(
            shapes=SHAPES, layers=LAYERS, slots=len(ranks) + 1, dtype=dtype, device=DEVICE
        )
        offset = 0
        for slot, of_adapter in enumerate(all_ranks):
            tables.fill(slot, self.packed.data_ptr() + offset, of_adapter)
            offset += self.adapters[slot].nbytes
        ends = [sum(count for _, count in runs[: i + 1]) for i in range(len(runs))]
        self.segments = [
            Segment(end - count, end, slot)
            for end, (slot, count) in zip(ends, runs, strict=True)
            if slot >= 0
        ]
        self.rows = ends[-1]
        self.linears = DecodeLinears(
            tables=tables,
            shapes=SHAPES,
            layers=LAYERS,
            rows=self.rows,
            pdl=PDL,
            processors=processors,
            shrink=shrink or ShrinkTuning(k_block=32, splits=4, programs=12),
        )

    def plan(self) -> DecodePlan:
        tiles = make_tiles(self.segments, TILE_ROWS)
        table = torch.full((len(tiles) + 2, 3), 10**6, dtype=torch.int32)
        table[: len(tiles)] = torch.from_numpy(tiles)
        count = torch.tensor([len(tiles)], dtype=torch.int32)
        return self.linears.plan(table.to(DEVICE), count.to(DEVICE))

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def weight(self, group: int) -> Tensor:
        shapes = [SHAPES[module] for module in GROUPS[group]]
        out = sum(shape.out_features for shape in shapes)
        return self.random(out, shapes[0].in_features, seed=group + 1) * 0.1

    def expected(self, x: Tensor, layer: int, group: int, bias: Tensor | None = None) -> Tensor:
        """fp32[rows, out]."""
        weight = self.weight(group).float()
        y = F.linear(x.float(), weight, None if bias is None else bias.float())
        Reference().plan(self.segments, self.adapters).add(y, x, layer, group)
        return y

    def x(self, group: int) -> Tensor:
        return self.random(self.rows, SHAPES[GROUPS[group][0]].in_features, seed=9)

    def got(self, plan: DecodePlan, layer: int, group: int, bias: Tensor | None = None) -> Tensor:
        linear = PlainLinear(
            self.weight(group).to(DEVICE), None if bias is None else bias.to(DEVICE)
        )
        x = self.x(group).to(DEVICE)
        if group == GATE_UP:
            return plan.gated(linear, x, layer, NO_OPS).cpu()
        y = plan.apply(linear, x, layer, group).cpu()
        return y.sum(0) if y.ndim == 3 else y

    def check(self, group: int, *layers: int) -> None:
        plan = self.plan()
        for layer in layers or range(LAYERS):
            expected = self.expected(self.x(group), layer, group)
            if group == GATE_UP:
                gate, up = expected.chunk(2, 1)
                expected = F.silu(gate) * up
            assert_close(self.got(plan, layer, group), expected, self.dtype)


class _NoOps(TorchOps):
    def __init__(self) -> None:
        pass


NO_OPS = _NoOps()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    scale = 1 + expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_row_gets_its_own_adapter(group: int, dtype: torch.dtype) -> None:
    Case(dtype=dtype).check(group)


@pytest.mark.parametrize("group", [QKV, OUT, DOWN])
def test_without_adapters_it_is_the_base_model(group: int) -> None:
    case = Case(runs=[(-1, 5)])
    expected = case.expected(case.x(group), 0, group)
    assert_close(case.got(case.linears.base(), 0, group), expected, case.dtype)
    assert_close(case.got(case.plan(), 0, group), expected, case.dtype)


def test_a_bias_is_added_once() -> None:
    case = Case(processors=64)
    for group in (QKV, OUT):
        bias = case.random(case.weight(group).shape[0], seed=7)
        expected = case.expected(case.x(group), 1, group, bias)
        assert_close(case.got(case.plan(), 1, group, bias), expected, case.dtype)


@pytest.mark.parametrize("rank", [1, 7, 16, 17, 64, 512])
def test_every_rank(rank: int) -> None:
    Case([[rank] * 7, [4] * 7], [(0, 3), (1, 1)]).check(QKV, 1)


def test_a_run_of_many_tiles_has_its_columns_once() -> None:
    case = Case([[16] * 7, [8] * 7], [(0, 40), (-1, 1), (0, 3), (1, 20)])
    plan = case.plan()
    assert plan._columns is not None
    assert plan._columns.counts.tolist() == [64] * 7  # three runs of 16 columns
    case.check(QKV, 1)


@pytest.mark.parametrize("programs", [1, 7, 500])
def test_any_number_of_programs_shrinks(programs: int) -> None:
    shrink = ShrinkTuning(k_block=32, splits=8, programs=programs)
    Case(shrink=shrink).check(QKV, 1)


@pytest.mark.parametrize("processors", [1, 1000])
def test_outputs_of_splits_are_parts_of_a_sum(processors: int) -> None:
    Case(processors=processors).check(DOWN)


def test_more_rows_than_a_block_has() -> None:
    Case([[8] * 7, [24] * 7], [(0, 90), (1, 70), (0, 1)]).check(QKV, 1)


def test_a_plan_forgets_the_step_before() -> None:
    case = Case()
    case.plan()
    case.segments = case.segments[:1]
    case.check(QKV, 1)


def test_steps_with_too_many_ranks_do_not_fit() -> None:
    case = Case([[512] * 7] * 4, [(0, 1), (1, 1), (2, 1), (3, 1)])
    assert case.linears.most_columns == 2048
    assert not case.linears.holds(case.segments)
    assert case.linears.holds(case.segments[:3])
    case.segments = case.segments[:3]
    case.check(QKV, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the overflow
def test_an_adapter_that_overflows_stays_with_its_own_rows() -> None:
    case = Case([[8] * 7, [8] * 7], [(0, 2), (1, 2), (0, 1)])
    large = 3e38 if case.dtype == torch.float32 else 6e4
    case.packed[case.adapters[0].nbytes :].view(case.dtype).fill_(large)
    expected = case.expected(case.x(QKV), 1, QKV)
    got = case.got(case.plan(), 1, QKV)
    kept = [0, 1, 4]
    assert_close(got[kept], expected[kept], case.dtype)
    assert not got[2:4].isfinite().all()
