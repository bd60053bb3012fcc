"""The grouped kernels against the reference, and the reference against the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.kernels.grouped import Grouped
from gpu_worker.kernels.reference import Reference, expand, shrink
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.stacks import MOST_MODULES
from pipeline.adapter_layout import GROUPS, MODULES, ModuleShape
from tests.gpu_worker.lora import make_pool, make_shapes

LAYERS = 2
ranks = st.lists(
    st.sampled_from([0, 0, 1, 3, 8, 16]),
    min_size=LAYERS * len(MODULES),
    max_size=LAYERS * len(MODULES),
)
lengths = st.sampled_from([0, 1, 1, 2, 5, 30])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def run(kernels: Grouped | Reference, case: "Case", layer: int, group: int) -> Tensor:
    x, y = case.tensors(group)
    kernels.plan(case.segments, case.pool.adapters).add(y, x, layer, group)
    return y


class Case:
    """Tokens of several adapters and of none, in runs of `runs`: (slot, tokens)."""

    def __init__(
        self, pool: AdapterPool, shapes: tuple[ModuleShape, ...], runs: list[tuple[int, int]]
    ) -> None:
        self.pool, self._shapes = pool, shapes
        self.segments: list[Segment] = []
        self.tokens = 0
        for slot, count in runs:
            if slot >= 0 and count:
                self.segments.append(Segment(self.tokens, self.tokens + count, slot))
            self.tokens += count

    def tensors(self, group: int) -> tuple[Tensor, Tensor]:
        """The same x and y each time."""
        generator = torch.Generator().manual_seed(group)
        out = sum(self._shapes[module].out_features for module in GROUPS[group])
        x = torch.randn(
            (self.tokens, self._shapes[GROUPS[group][0]].in_features), generator=generator
        )
        y = torch.randn((self.tokens, out), generator=generator)
        dtype = self.pool.adapters[0].groups[0][0].lora_a.dtype
        return x.to(dtype), y.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    of_adapters=st.lists(ranks, min_size=1, max_size=4),
    runs=st.lists(st.tuples(st.integers(-1, 3), lengths), max_size=8),
    dtype=st.sampled_from(list(TOLERANCE)),
    hidden=st.sampled_from([32, 30, 9]),  # rows of A that are not multiples of ALIGNMENT too
    segment_calls=st.sampled_from([0, 2_000, 10**9]),
    stack_bytes=st.sampled_from([0, 20_000, 10**9]),
)
def test_grouped_does_what_the_reference_does(
    of_adapters: list[list[int]],
    runs: list[tuple[int, int]],
    dtype: torch.dtype,
    hidden: int,
    segment_calls: int,
    stack_bytes: int,
) -> None:
    shapes = make_shapes(hidden=hidden)
    runs = [(min(slot, len(of_adapters) - 1), count) for slot, count in runs]
    case = Case(make_pool(of_adapters, shapes=shapes, dtype=dtype), shapes, runs)
    grouped = Grouped(segment_calls=segment_calls, stack_bytes=stack_bytes)
    for layer in range(LAYERS):
        for group in range(len(GROUPS)):
            expected = run(Reference(), case, layer, group)
            torch.testing.assert_close(
                run(grouped, case, layer, group),
                expected,
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype] * (1 + expected.abs().max().item() if case.tokens else 1),
            )


def test_the_reference_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, q, v = (torch.randn(s, generator=generator) for s in ((5, 6), (7, 6), (4, 3), (2, 4)))
    y = torch.zeros((5, 6))
    expand(y, shrink(x, a), (q, v))
    expected = torch.cat((x @ a[:3].T @ q.T, x @ a[3:].T @ v.T), 1)
    torch.testing.assert_close(y, expected)


def test_the_reference_shrinks_in_fp32() -> None:
    x = torch.ones((1, 512), dtype=torch.bfloat16)
    assert shrink(x, torch.ones((1, 512), dtype=torch.bfloat16) * 1.0078125).item() == 516.0


EVERYWHERE = [8] * len(MODULES)


def stretch_sizes(kernels: Grouped, runs: list[tuple[int, int]]) -> list[int]:
    """Segments of each stretch."""
    shapes = make_shapes()
    case = Case(make_pool([EVERYWHERE] * 4, shapes=shapes), shapes, runs)
    return [len(s.segments) for s in kernels.stretches(case.segments, case.pool.adapters)]


def test_small_segments_share_a_stretch_and_long_chunks_do_not() -> None:
    decode = [(-1, 3), (0, 2), (1, 1), (2, 1)]
    assert stretch_sizes(Grouped(segment_calls=100_000), [*decode, (3, 500), (0, 400)]) == [3, 1, 1]


def test_what_exceeds_the_memory_for_stacks_is_not_stacked() -> None:
    runs = [(0, 1), (1, 1), (2, 1), (3, 1)]
    nbytes = make_pool([EVERYWHERE], shapes=make_shapes()).adapters[0].nbytes
    assert stretch_sizes(Grouped(stack_bytes=2 * MOST_MODULES * nbytes), runs) == [2, 2]
    assert stretch_sizes(Grouped(stack_bytes=MOST_MODULES * nbytes), runs) == [1, 1, 1, 1]


@pytest.mark.parametrize("kernels", [Grouped(), Reference()], ids=["grouped", "reference"])
def test_an_adapter_that_overflows_stays_with_its_own_tokens(kernels: Grouped | Reference) -> None:
    shapes = make_shapes()
    pool = make_pool([EVERYWHERE, EVERYWHERE], shapes=shapes)
    for a, _ in pool.adapters[1].groups[0]:
        a.fill_(3e38)
    case = Case(pool, shapes, [(-1, 2), (0, 2), (1, 2)])
    x, y = case.tensors(0)
    expected = run(kernels, Case(pool, shapes, [(-1, 2), (0, 2), (-1, 2)]), 0, 0)
    kernels.plan(case.segments, pool.adapters).add(y, x, 0, 0)
    torch.testing.assert_close(y[:4], expected[:4])
    assert not y[4:].isfinite().all()
