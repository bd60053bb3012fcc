"""What stands between linear layers, as Triton kernels."""

from torch import Tensor

from gpu_worker.kernels.triton_ops import add_rms_norm, rms_norm, silu_mul
from gpu_worker.kernels.triton_rotary import rotate_and_store
from gpu_worker.kv_cache import KvCache


class TritonOps:
    """For one step; may be captured in a CUDA graph.

    cos_sin    fp32[positions, head_dim], see Rotary.table
    positions  int64[tokens]
    kv_slots   int64[tokens], where their keys and values go; -1: nowhere
    pdl        see kernels.triton_ops
    """

    def __init__(
        self,
        *,
        cos_sin: Tensor,
        kv_cache: KvCache,
        kv_heads: int,
        norm_eps: float,
        positions: Tensor,
        kv_slots: Tensor,
        pdl: bool,
    ) -> None:
        self._pdl = pdl
        self._cos_sin = cos_sin
        self._kv_cache = kv_cache
        self._kv_heads = kv_heads
        self._norm_eps = norm_eps
        self._positions = positions
        self._kv_slots = kv_slots

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._norm_eps, pdl=self._pdl)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return add_rms_norm(x, residual, weight, self._norm_eps, pdl=self._pdl)

    def rotate_and_store(self, layer: int, qkv: Tensor, qk_norm: Tensor | None) -> None:
        rotate_and_store(
            qkv.flatten(1),
            self._positions,
            self._kv_slots,
            self._cos_sin,
            self._kv_cache.layer(layer),
            qkv.shape[1] - 2 * self._kv_heads,
            self._kv_heads,
            qkv.shape[2],
            qk_norm,
            self._norm_eps,
            pdl=self._pdl,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up, pdl=self._pdl)
