"""What stands between linear layers, in plain torch, which runs everywhere."""

import torch.nn.functional as F
from torch import Tensor

from gpu_worker.kv_cache import KvCache
from gpu_worker.layers.rotary import Rotary


class TorchOps:
    """For one step.

    positions  int64[tokens]
    kv_slots   int64[tokens], where their keys and values go
    """

    def __init__(
        self,
        *,
        rotary: Rotary,
        kv_cache: KvCache,
        kv_heads: int,
        norm_eps: float,
        positions: Tensor,
        kv_slots: Tensor,
    ) -> None:
        self._rotary = rotary
        self._kv_cache = kv_cache
        self._kv_heads = kv_heads
        self._norm_eps = norm_eps
        self._angles = rotary.angles(positions)
        self._places = kv_cache.places(kv_slots)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._norm_eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return self.norm(residual.add_(x), weight)

    def rotate_and_store(self, layer: int, qkv: Tensor, qk_norm: Tensor | None) -> None:
        rotated = qkv.shape[1] - self._kv_heads
        qk = qkv[:, :rotated]
        if qk_norm is not None:
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], None, self._norm_eps) * qk_norm)
        self._rotary.rotate(qk, self._angles)
        self._kv_cache.write(layer, self._places, qkv[:, rotated - self._kv_heads :])

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
