"""Norm and activation for CUDA: one pass over memory each, valid in CUDA graphs.

`pdl` here and in the other Triton modules is programmatic dependent launch: the kernel may start
while the one before it in the stream still runs, and waits for it before it reads what that wrote.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SILU_BLOCK = 1024  # at 4 warps: 16 bytes a thread


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """F.rms_norm over the last dimension: fp32 until the one rounding at its end.

    x        [tokens, hidden], rows may be strided
    weight   [hidden]
    returns  [tokens, hidden]: `out`, or a new tensor
    """
    return _launch_norm(x, None, weight, eps, out, pdl)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual += x, rounded to the compute dtype; then rms_norm of it.

    x         [tokens, hidden], or [parts, tokens, hidden], which are summed up; rows may be strided
    residual  [tokens, hidden], rows may be strided; changed
    returns   [tokens, hidden]: `out`, which may be x, or a new tensor
    """
    return _launch_norm(x, residual, weight, eps, out, pdl)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
    """silu(gate) * up.

    gate_up  [tokens, 2 * intermediate], gate before up; rows may be strided
    returns  [tokens, intermediate]: `out`, or a new tensor
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(width, SILU_BLOCK))](
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            width,
            BLOCK=SILU_BLOCK,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )
    return out


def _launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, pdl: bool
) -> Tensor:
    tokens, width = x.shape[-2:]
    if out is None:
        out = torch.empty((tokens, width), dtype=weight.dtype, device=x.device)
    if tokens:
        block = triton.next_power_of_2(width)
        _norm_kernel[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            x.stride(-2),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            width,
            eps,
            BLOCK=block,
            PARTS=x.shape[0] if x.ndim == 3 else 1,
            ADD=residual is not None,
            PDL=pdl,
            num_warps=min(max(block // 512, 1), 8),
            launch_pdl=pdl,
        )
    return out


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    part_stride,
    residual_stride,
    out_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, inside, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + column, inside, other=0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + row * x_stride + column, inside, other=0)
    if ADD:
        place = residual_ptr + row * residual_stride + column
        residual = tl.load(place, inside, other=0)
        added = (residual.to(tl.float32) + x).to(residual.dtype)
        tl.store(place, added, inside)
        x = added.to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    y = x * scale * weight
    tl.store(out_ptr + row * out_stride + column, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    out_stride,
    width,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK outputs of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = gate_up_ptr + row * gate_up_stride + column
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(place, inside, other=0)
    up = tl.load(place + width, inside, other=0)
    exact = gate.to(tl.float32)
    silu = (exact / (1 + tl.exp(-exact))).to(gate.dtype)  # rounded here as F.silu does
    act = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, act.to(out_ptr.dtype.element_ty), inside)
