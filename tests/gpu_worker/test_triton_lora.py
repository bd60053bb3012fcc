"""The LoRA kernels for CUDA against the reference; without a GPU, in Triton's interpreter."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.reference import Reference
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.tiles import make_tiles
from gpu_worker.kernels.triton_lora import TritonLora, Tuning
from gpu_worker.kernels.triton_step import StepTables
from gpu_worker.layers import QKV
from pipeline.adapter_layout import GROUPS, ModuleShape
from tests.gpu_worker import interpreter  # noqa: F401
from tests.gpu_worker.lora import make_pool, make_shapes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tuning(
    tile_height=16,
    rank_block=16,
    k_block=32,
    splits=4,
    shrink_programs=12,
    out_block=64,
    expand_programs=10,
)
LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if torch.cuda.is_available():  # the interpreter's dot of bf16 is not right
    TOLERANCE[torch.bfloat16] = 3e-2


class Case:
    """Adapters in a pool, and a step of theirs.

    ranks  [slot][module], the same in each layer, of which `layer` is looked at
    runs   (slot, tokens); the slot -1 is the base model
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[int]],
        runs: Sequence[tuple[int, int]],
        *,
        shapes: tuple[ModuleShape, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        tuning: Tuning = SMALL,
        layer: int = 1,
    ) -> None:
        self.shapes = make_shapes(hidden=64) if shapes is None else shapes
        self.layer, self.dtype = layer, dtype
        pool = make_pool([[*r] * LAYERS for r in ranks], shapes=self.shapes, dtype=dtype)
        self.adapters = pool.adapters
        packed = pool._pool.to(DEVICE)
        tables = AdapterTables(
            shapes=self.shapes, layers=LAYERS, slots=len(ranks) + 1, dtype=dtype, device=DEVICE
        )
        offset = 0
        for slot, of_adapter in enumerate(ranks):
            tables.fill(slot, packed.data_ptr() + offset, [*of_adapter] * LAYERS)
            offset += self.adapters[slot].nbytes
        self._packed = packed
        ends = [sum(count for _, count in runs[: i + 1]) for i in range(len(runs))]
        self.segments = [
            Segment(end - count, end, slot)
            for end, (slot, count) in zip(ends, runs, strict=True)
            if slot >= 0
        ]
        self.tokens = ends[-1]
        self.lora = TritonLora(
            tables=tables,
            shapes=self.shapes,
            tokens=self.tokens,
            sequences=len(runs),
            tuning=tuning,
            max_rank=max(max(r) for r in ranks),
        )

    def step(self, *, with_base: bool = False, spare: int = 2) -> StepTables:
        """spare: rows of the tile table that are not in use, and hold nonsense."""
        tiles = make_tiles(
            self.segments, self.lora.tuning.tile_height, self.tokens if with_base else None
        )
        table = torch.full((len(tiles) + spare, 3), 10**6, dtype=torch.int32, device=DEVICE)
        table[: len(tiles)] = torch.from_numpy(tiles)
        count = torch.tensor([len(tiles)], dtype=torch.int32, device=DEVICE)
        return self.lora.prepare(table, count)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def expected(self, y: Tensor, x: Tensor, group: int) -> Tensor:
        """fp32 of what the reference makes of y, which stays as it is."""
        y = y.clone()
        Reference().plan(self.segments, self.adapters).add(y, x, self.layer, group)
        return y

    def in_features(self, group: int) -> int:
        return self.shapes[GROUPS[group][0]].in_features

    def out_features(self, group: int) -> int:
        return sum(self.shapes[module].out_features for module in GROUPS[group])

    def check_add(self, group: int, **step: bool) -> None:
        x = self.random(self.tokens, self.in_features(group))
        y = self.random(self.tokens, self.out_features(group), seed=1)
        expected = self.expected(y, x, group)
        on_device = y.to(DEVICE)
        tables = self.step(**step)
        self.lora.shrink(x.to(DEVICE), tables, self.layer, group)
        self.lora.expand(on_device, tables, self.layer, group)
        assert_close(on_device.cpu(), expected)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    scale = 1 + expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_token_gets_what_the_reference_gives_it(group: int, dtype: torch.dtype) -> None:
    ranks = [[8] * 7, [16] * 7, [3, 0, 7, 1, 0, 5, 33]]
    runs = [(0, 1), (-1, 2), (1, 18), (2, 3), (-1, 1), (0, 1)]
    Case(ranks, runs, dtype=dtype).check_add(group)


@pytest.mark.parametrize("rank", [0, 1, 7, 8, 16, 33, 64, 512])
def test_every_rank(rank: int) -> None:
    Case([[rank] * 7, [4] * 7], [(0, 3), (1, 1)]).check_add(QKV)


def test_a_module_may_be_missing_anywhere() -> None:
    ranks = [[0, 8, 8, 8, 0, 8, 8], [8, 0, 8, 0, 8, 0, 0], [8, 8, 0, 8, 0, 0, 8], [0] * 7]
    case = Case(ranks, [(0, 2), (1, 2), (2, 2), (3, 2)])
    for group in range(len(GROUPS)):
        case.check_add(group)


def test_sizes_need_not_be_multiples_of_the_blocks() -> None:
    case = Case([[12] * 7, [64] * 7], [(0, 17), (1, 5)], shapes=make_shapes(72, 24, 100))
    for group in range(len(GROUPS)):
        case.check_add(group)


def test_tiles_of_the_base_model_change_nothing() -> None:
    Case([[8] * 7], [(-1, 20), (0, 1), (-1, 1)]).check_add(QKV, with_base=True)
    Case([[8] * 7], [(-1, 20)]).check_add(QKV, with_base=True)


def test_a_step_without_tiles_changes_nothing() -> None:
    Case([[8] * 7], [(-1, 3)]).check_add(QKV)


@pytest.mark.parametrize("programs", [1, 7, 500])
def test_any_number_of_programs_does_all_the_work(programs: int) -> None:
    tuning = SMALL._replace(shrink_programs=programs, expand_programs=programs)
    Case([[24] * 7, [8] * 7], [(0, 20), (1, 2)], tuning=tuning).check_add(QKV)


@pytest.mark.parametrize(
    "tuning",
    [
        SMALL._replace(splits=1),
        SMALL._replace(tile_height=32, rank_block=32),
    ],
)
def test_other_tunings(tuning: Tuning) -> None:
    ranks = [[8] * 7, [40] * 7, [5] * 7]
    Case(ranks, [(0, 40), (1, 2), (2, 2)], tuning=tuning).check_add(QKV)


def test_rows_of_x_and_y_may_be_apart() -> None:
    case = Case([[8] * 7], [(0, 4)])
    x, y = case.random(4, 200), case.random(4, 300)
    inside = slice(16, 16 + case.out_features(QKV))
    expected = y.clone()
    expected[:, inside] = case.expected(y[:, inside], x[:, 8:72], QKV)
    tables = case.step()
    y = y.to(DEVICE)
    case.lora.shrink(x.to(DEVICE)[:, 8:72], tables, 1, QKV)
    case.lora.expand(y[:, inside], tables, 1, QKV)
    assert_close(y.cpu(), expected)


def test_layers_have_their_own_matrices() -> None:
    for layer in range(LAYERS):
        Case([[8] * 7], [(0, 2)], layer=layer).check_add(QKV)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the overflow
def test_an_adapter_that_overflows_stays_with_its_own_tokens() -> None:
    case = Case([[8] * 7, [8] * 7], [(0, 2), (1, 2), (0, 1)])
    case._packed[case.adapters[0].nbytes :].view(torch.float32).fill_(3e38)
    x, y = case.random(5, 64), case.random(5, case.out_features(QKV), seed=1)
    expected = case.expected(y, x, QKV)
    tables = case.step()
    y = y.to(DEVICE)
    case.lora.shrink(x.to(DEVICE), tables, 1, QKV)
    case.lora.expand(y, tables, 1, QKV)
    assert_close(y.cpu()[[0, 1, 4]], expected[[0, 1, 4]])
    assert not y[2:4].isfinite().all()
