"""The Triton kernels around the linear layers against the torch code that the CPU runs."""

import pytest
import torch
import torch.nn.functional as F

from gpu_worker.kernels.triton_ops import add_rms_norm, rms_norm, silu_mul
from tests.gpu_worker.triton_device import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8), (3, 100), (5, 64), (2, 1030)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_that_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(DEVICE, dtype), torch.randn(shape[1]).to(DEVICE, dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, shape[1:], weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_rounded_before_it_is_normed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn((2, *shape)).to(DEVICE, dtype)
    weight = torch.randn(shape[1]).to(DEVICE, dtype)
    added = residual + x
    expected = F.rms_norm(added, shape[1:], weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-5), expected)
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # the interpreter rounds it down
        torch.testing.assert_close(residual, added)
    else:
        torch.testing.assert_close(residual, added, rtol=0, atol=0)


def test_a_norm_of_strided_rows_into_a_given_buffer() -> None:
    wide = torch.randn((4, 3 * 48), device=DEVICE)
    x, residual, out = wide.chunk(3, 1)
    weight = torch.randn(48, device=DEVICE)
    kept, added = x.clone(), residual + x
    assert add_rms_norm(x, residual, weight, 1e-6, out=out) is out
    torch.testing.assert_close(out, F.rms_norm(added, (48,), weight, 1e-6))
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    torch.testing.assert_close(residual, added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 100), (2, 2 * 1025)])
def test_silu_mul_is_that_of_the_decoder(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = torch.randn(shape).to(DEVICE, dtype) * 4
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow")  # of NumPy, in the interpreter
def test_large_gates_do_not_overflow() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 1.0, 2.0, 3.0]], device=DEVICE)
    expected = torch.tensor([[0.0, 2e4, 0.0]], device=DEVICE)
    torch.testing.assert_close(silu_mul(gate_up), expected)


def test_no_rows_launch_nothing() -> None:
    x = torch.empty((0, 16), device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    assert rms_norm(x, weight, 1e-5).shape == (0, 16)
    assert add_rms_norm(x, x, weight, 1e-5).shape == (0, 16)
    assert silu_mul(x).shape == (0, 8)
