"""Layers: linear ones, and what stands between them in a decoder."""

from typing import Protocol

from torch import Tensor

from gpu_worker.layers.linear import Linear

QKV, OUT, GATE_UP, DOWN = range(4)  # adapter_layout.GROUPS


class LayerOps(Protocol):
    """What a decoder layer does between its linear layers and attention, for one step's tokens."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of [tokens, hidden]; statistics in fp32. The caller's."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        """residual += x, then its RMS norm, the caller's.

        x  [tokens, hidden], which may be overwritten; or, if the step's linear layers give that,
           fp32[splits, tokens, hidden], to be summed up
        """
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


class Linears(Protocol):
    """The linear layers of one step, a group at a time: modules that read the same input."""

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        """
        x        [tokens, in]
        returns  [tokens, sum of the modules' out], the modules side by side, the caller's; of the
                 groups OUT and DOWN, it may be what add_norm takes
        """
        ...

    def gated(self, linear: Linear, x: Tensor, layer: int, ops: LayerOps) -> Tensor:
        """silu(gate) * up of the group GATE_UP, [tokens, intermediate], the caller's."""
        ...


class BaseLinears:
    """Those of the base model."""

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        """See Linears."""
        return linear(x)

    def gated(self, linear: Linear, x: Tensor, layer: int, ops: LayerOps) -> Tensor:
        """See Linears."""
        return ops.silu_mul(linear(x))
