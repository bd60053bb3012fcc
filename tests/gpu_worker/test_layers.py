"""Linear layers and rotary embeddings against torch and transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from gpu_worker.layers.linear import make_linear
from gpu_worker.layers.rotary import Rotary
from tests.gpu_worker.tiny import LINEAR, LLAMA3

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("shape", [(96, 64), (17, 9), (1, 1)])
def test_a_linear_layer_is_a_linear_layer(
    dtype: torch.dtype, biased: bool, rows: int, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    x = torch.randn(rows, shape[1]).to(dtype)
    with torch.inference_mode():
        got = make_linear(weight, bias if biased else None)(x)
    expected = F.linear(x.float(), weight.float(), bias.float() if biased else None)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR])
def test_rotation_is_that_of_transformers(scaling: dict[str, Any] | None) -> None:
    rope = {"rope_theta": 5000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    positions = torch.tensor([0, 1, 17, 500, 1999])
    x = torch.randn(5, 3, 16)
    theirs = LlamaRotaryEmbedding(config)
    cos, sin = theirs(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)

    ours = Rotary(head_dim=16, theta=5000.0, scaling=scaling, device=CPU)
    ours.rotate(x, ours.angles(positions))
    torch.testing.assert_close(x, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rotated_in_fp32() -> None:
    rotary = Rotary(head_dim=64, theta=10000.0, scaling=None, device=CPU)
    angles = rotary.angles(torch.tensor([123, 4567]))
    exact = torch.randn(2, 4, 64).to(torch.bfloat16)
    rounded = exact.clone()
    exact = exact.float()
    rotary.rotate(exact, angles)
    rotary.rotate(rounded, angles)
    assert torch.equal(rounded, exact.to(torch.bfloat16))
