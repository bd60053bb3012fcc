"""Layers: linear ones, and what stands between them in a decoder."""

from typing import Protocol

from torch import Tensor


class LayerOps(Protocol):
    """What a decoder layer does between its linear layers and attention, for one step's tokens."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of [tokens, hidden]; statistics in fp32. The caller's."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        """residual += x, then its RMS norm, the caller's. x may be overwritten."""
        ...

    def rotate_and_store(self, layer: int, qkv: Tensor, qk_norm: Tensor | None) -> None:
        """Norm and rotate the queries and keys in place; put keys and values into the KV cache.

        qkv      [tokens, heads + 2 * kv_heads, head_dim]
        qk_norm  [heads + kv_heads, head_dim], or None where the model has no such norm
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [tokens, 2 * intermediate], gate first. The caller's."""
        ...
