"""Rotary position embedding, plain or scaled (llama3, linear), in fp32.

RoFormer (arXiv:2104.09864), with the halves of a head as pairs, as Hugging Face lays them out.
"""

import math
from typing import Any

import torch
from torch import Tensor


class Rotary:
    """The angles of one model."""

    def __init__(
        self,
        *,
        head_dim: int,
        theta: float,
        scaling: dict[str, Any] | None,
        device: torch.device,
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None and scaling["rope_type"] == "linear":
            frequencies = frequencies / float(scaling["factor"])
        elif scaling is not None:
            frequencies = _llama3(frequencies, scaling)
        self._frequencies = frequencies.to(device)
        self._half = head_dim // 2

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `rotate` wants for tokens at these positions, for all layers.

        positions  int64[tokens]
        returns    cos and signed sin, fp32[tokens, 1, head_dim]
        """
        half = positions[:, None].float() * self._frequencies
        cos, sin = half.cos(), half.sin()
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def table(self, positions: int) -> Tensor:
        """fp32[positions, head_dim]: the cosines of each position, then the sines."""
        at = torch.arange(positions, device=self._frequencies.device)
        angles = at[:, None].float() * self._frequencies
        return torch.cat((angles.cos(), angles.sin()), -1)

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """Rotate x [tokens, heads, head_dim] in place."""
        cos, sin = angles
        exact = x.float()
        swapped = exact.roll(self._half, -1)
        x.copy_((exact * cos).addcmul_(swapped, sin))


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies
