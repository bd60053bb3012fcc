"""rotate_and_store against the rotary embedding, norm and KV cache that the CPU runs."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.kernels.triton_rotary import make_cos_sin, rotate_and_store
from gpu_worker.layers.rotary import Rotary
from tests.gpu_worker.triton_device import DEVICE

BLOCKS, POSITIONS, EPS = 7, 300, 1e-6


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int


SHAPES = [Shape(4, 2, 64, 16), Shape(7, 1, 16, 3), Shape(3, 3, 96, 32), Shape(32, 8, 128, 16)]


def expected(
    qkv: Tensor, positions: Tensor, slots: Tensor, cache: Tensor, weight: Tensor | None, s: Shape
) -> tuple[Tensor, Tensor]:
    """As Decoder and KvCache do it; slots of -1 stay as they are."""
    rotary = Rotary(head_dim=s.head_dim, theta=1e4, scaling=None, device=DEVICE)
    real = slots >= 0
    view = qkv[real].view(-1, s.heads + 2 * s.kv_heads, s.head_dim)
    qk = view[:, : s.heads + s.kv_heads]
    if weight is not None:
        qk.copy_(F.rms_norm(qk, (s.head_dim,), None, EPS) * weight)
    rotary.rotate(qk, rotary.angles(positions[real]))
    qkv, cache = qkv.clone(), cache.clone()
    qkv[real] = view.flatten(1)
    block, place = slots[real] // s.block_tokens, slots[real] % s.block_tokens
    cache[block, 0, :, place] = view[:, s.heads : s.heads + s.kv_heads]
    cache[block, 1, :, place] = view[:, s.heads + s.kv_heads :]
    return qkv, cache


def check(s: Shape, dtype: torch.dtype, *, normed: bool, index_dtype: torch.dtype) -> None:
    tokens = 6
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    qkv = torch.randn((tokens, width + 8), device=DEVICE).to(dtype)[:, :width]
    positions = torch.randint(POSITIONS, (tokens,), device=DEVICE)
    slots = torch.randperm(BLOCKS * s.block_tokens, device=DEVICE)[:tokens]
    slots[2] = -1
    cache = torch.randn((BLOCKS, 2, s.kv_heads, s.block_tokens, s.head_dim), device=DEVICE)
    cache = cache.to(dtype)
    weight = torch.randn((s.heads + s.kv_heads, s.head_dim), device=DEVICE).to(dtype)
    want = expected(qkv, positions, slots, cache, weight if normed else None, s)
    exponents = torch.arange(0, s.head_dim, 2, dtype=torch.int64, device=DEVICE).float()
    rotate_and_store(
        qkv,
        positions.to(index_dtype),
        slots.to(index_dtype),
        make_cos_sin(1.0 / 1e4 ** (exponents / s.head_dim), POSITIONS),
        cache,
        s.heads,
        s.kv_heads,
        s.head_dim,
        weight if normed else None,
        EPS,
    )
    # the interpreter rounds down to bf16, here three times
    atol, rtol = (0.1, 0.03) if dtype == torch.bfloat16 and normed else (None, None)
    torch.testing.assert_close(qkv, want[0], atol=atol, rtol=rtol)
    torch.testing.assert_close(cache, want[1], atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_it_is_what_the_cpu_does(shape: Shape, dtype: torch.dtype, normed: bool) -> None:
    check(shape, dtype, normed=normed, index_dtype=torch.int64)


def test_positions_and_slots_may_be_int32() -> None:
    check(SHAPES[0], torch.float32, normed=False, index_dtype=torch.int32)
