"""Expand together with the activation that follows it, against plain torch."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from gpu_worker.layers import GATE_UP
from tests.gpu_worker.test_triton_lora import DEVICE, TOLERANCE, Case, assert_close

RANKS = [[8] * 7, [16, 0, 3, 40, 0, 24, 1], [0] * 7]
RUNS = [(0, 1), (-1, 2), (1, 18), (2, 3), (-1, 1), (0, 1)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expand_and_silu(dtype: torch.dtype) -> None:
    case = Case(RANKS, RUNS, dtype=dtype)
    x = case.random(case.tokens, 64)
    y = case.random(case.tokens, case.out_features(GATE_UP), seed=1)
    gate, up = case.expected(y, x, GATE_UP).float().chunk(2, 1)

    step = case.step(with_base=True)
    act = torch.full_like(gate, torch.nan, dtype=dtype, device=DEVICE)
    case.lora.shrink(x.to(DEVICE), step, case.layer, GATE_UP)
    case.lora.expand_silu(y.to(DEVICE), act, step, case.layer)
    assert_close(act.cpu(), (F.silu(gate) * up).to(dtype))
