"""Expand and shrink together with the steps of the model around them, against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gpu_worker.kernels.triton_lora import DOWN, GATE_UP, OUT, QKV, Tuning
from tests.gpu_worker.lora import make_shapes
from tests.gpu_worker.test_triton_lora import DEVICE, SMALL, TOLERANCE, Case, assert_close

RANKS = [[8] * 7, [16, 0, 3, 40, 0, 24, 1], [0] * 7]
RUNS = [(0, 1), (-1, 2), (1, 18), (2, 3), (-1, 1), (0, 1)]
TUNINGS = [SMALL, SMALL._replace(atomic=True)]
HEADS, KV_HEADS = 4, 1


@pytest.mark.parametrize("tuning", TUNINGS, ids=["partial sums", "atomic"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expand_and_silu(tuning: Tuning, dtype: torch.dtype) -> None:
    case = Case(RANKS, RUNS, dtype=dtype, tuning=tuning)
    x = case.random(case.tokens, 64)
    y = case.random(case.tokens, case.out_features(GATE_UP), seed=1)
    gate, up = case.expected(y, x, GATE_UP).float().chunk(2, 1)

    step = case.step(with_base=True)
    act = torch.full_like(gate, torch.nan, dtype=dtype, device=DEVICE)
    case.lora.shrink(x.to(DEVICE), step, case.layer, GATE_UP)
    case.lora.expand_silu(y.to(DEVICE), act, step, case.layer)
    assert_close(act.cpu(), (F.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("group", [OUT, DOWN])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expand_and_residual_then_norm_and_shrink(group: int, dtype: torch.dtype) -> None:
    case = Case(RANKS, RUNS, dtype=dtype)
    x = case.random(case.tokens, case.in_features(group))
    y = case.random(case.tokens, 64, seed=1)
    before = case.random(case.tokens, 64, seed=2)
    weight = case.random(64, seed=3)
    residual = (before.float() + case.expected(y, x, group).float()).to(dtype)
    normed = F.rms_norm(residual.float(), (64,), weight.float(), 1e-5).to(dtype)
    gate_up = case.random(case.tokens, case.out_features(GATE_UP), seed=4)
    expected = case.expected(gate_up, normed, GATE_UP)

    step = case.step(with_base=True)
    actual, on_device = before.to(DEVICE), torch.full_like(normed, torch.nan, device=DEVICE)
    parts = case.lora.square_parts(group)
    squares = torch.full((case.tokens, parts), torch.nan, device=DEVICE)
    case.lora.shrink(x.to(DEVICE), step, case.layer, group)
    case.lora.expand_residual(y.to(DEVICE), actual, squares, step, case.layer, group)
    assert_close(actual.cpu(), residual)
    case.lora.norm_shrink(
        actual, on_device, weight.to(DEVICE), squares, 1e-5, step, case.layer, GATE_UP
    )
    assert_close(on_device.cpu(), normed)
    gate_up = gate_up.to(DEVICE)
    case.lora.expand(gate_up, step, case.layer, GATE_UP)
    assert_close(gate_up.cpu(), expected)


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expand_and_rotary_and_cache(head_dim: int, dtype: torch.dtype) -> None:
    hidden = HEADS * head_dim
    shapes = make_shapes(hidden=hidden, kv=KV_HEADS * head_dim)
    case = Case(RANKS, RUNS, dtype=dtype, shapes=shapes)
    x = case.random(case.tokens, hidden)
    y = case.random(case.tokens, case.out_features(QKV), seed=1)
    positions = torch.arange(case.tokens) * 3
    kv_slots = torch.randperm(48, generator=torch.Generator().manual_seed(2))[: case.tokens]
    kv_slots[4] = -1
    angle = torch.outer(torch.arange(100), 0.5 ** torch.arange(head_dim // 2)).float()
    expected = case.expected(y, x, QKV).view(case.tokens, -1, head_dim)
    turned = rotate(expected.float(), angle[positions])

    step = case.step(with_base=True)
    cache = torch.full((7, 2, KV_HEADS, 8, head_dim), 9.0, dtype=dtype, device=DEVICE)
    qkv = y.to(DEVICE)
    case.lora.shrink(x.to(DEVICE), step, case.layer, QKV)
    case.lora.expand_rotary(
        qkv,
        angle.cos().to(DEVICE),
        angle.sin().to(DEVICE),
        positions.to(DEVICE),
        kv_slots.to(DEVICE),
        cache,
        step,
        case.layer,
    )
    q = qkv.cpu().view(case.tokens, -1, head_dim)[:, :HEADS]
    assert_close(q, turned[:, :HEADS].to(dtype))
    held = torch.full((7 * 8, 2 * KV_HEADS, head_dim), 9.0)
    written = kv_slots >= 0
    new = torch.cat((turned[:, HEADS : HEADS + KV_HEADS], expected[:, HEADS + KV_HEADS :]), 1)
    held[kv_slots[written]] = new[written].float()
    held = held.view(7, 8, 2, KV_HEADS, head_dim).permute(0, 2, 3, 1, 4)
    assert_close(cache.cpu(), held.to(dtype))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
