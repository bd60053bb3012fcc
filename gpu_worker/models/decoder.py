"""The decoder of Llama, Mistral, Qwen2 and Qwen3, which differ only in numbers and switches."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.attention import AttentionPlan
from gpu_worker.kernels import LoraPlan
from gpu_worker.kv_cache import KvCache
from gpu_worker.layers.linear import Linear, make_linear
from gpu_worker.layers.rotary import Rotary
from gpu_worker.progress import progress
from gpu_worker.weights import EMBEDDING, LM_HEAD, NORM, Checkpoint, module_name
from pipeline.model_config import ModelConfig

QKV, OUT, GATE_UP, DOWN = range(4)  # adapter_layout.GROUPS


class Batch(NamedTuple):
    """What one forward pass is given."""

    token_ids: Tensor  # int64[tokens]
    positions: Tensor  # int64[tokens]
    kv_slots: Tensor  # int64[tokens], where their keys and values go
    sampled: Tensor  # int64[sampled]: the tokens whose logits are wanted
    attention: AttentionPlan
    lora: LoraPlan | None  # None: no token has an adapter


class _Layer(NamedTuple):
    """The weights of one layer; what reads the same input is one matrix."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    windowed: bool


class Decoder:
    """The base model. Owns its weights; what it writes is the KV cache that it is given."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> None:
        self._config = config
        self._rotary = Rotary(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            device=device,
        )
        self._embedding = checkpoint.read(EMBEDDING)
        self._layers = list(_read_layers(config, checkpoint))
        self._norm = checkpoint.read(NORM)
        tied = config.tied_embeddings
        self._lm_head = make_linear(self._embedding if tied else checkpoint.read(LM_HEAD))

    def forward(self, batch: Batch, kv_cache: KvCache) -> Tensor:
        """Run the tokens of a step. Returns logits [sampled, vocabulary] in the compute dtype."""
        x = F.embedding(batch.token_ids, self._embedding)
        angles = self._rotary.angles(batch.positions)
        for index, layer in enumerate(self._layers):
            attended = self._attend(
                index, layer, self._normed(x, layer.input_norm), batch, angles, kv_cache
            )
            x.add_(self._apply(layer.out, attended, batch.lora, index, OUT))
            gate_up = self._apply(
                layer.gate_up, self._normed(x, layer.mlp_norm), batch.lora, index, GATE_UP
            )
            gate, up = gate_up.chunk(2, -1)
            x.add_(self._apply(layer.down, F.silu(gate).mul_(up), batch.lora, index, DOWN))
        return self._lm_head(self._normed(x.index_select(0, batch.sampled), self._norm))

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: Tensor,
        batch: Batch,
        angles: tuple[Tensor, Tensor],
        kv_cache: KvCache,
    ) -> Tensor:
        heads, kv_heads = self._config.heads, self._config.kv_heads
        fused = self._apply(layer.qkv, x, batch.lora, index, QKV)
        qkv = fused.view(-1, heads + 2 * kv_heads, self._config.head_dim)
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], None, self._config.norm_eps) * layer.qk_norm)
        self._rotary.rotate(qk, angles)
        kv_cache.write(index, batch.kv_slots, fused[:, heads * self._config.head_dim :])
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        return batch.attention.attend(q, k, v, kv_cache.layer(index), layer.windowed)

    def _apply(
        self, linear: Linear, x: Tensor, lora: LoraPlan | None, layer: int, group: int
    ) -> Tensor:
        y = linear(x)
        if lora is not None:
            lora.add(y, x, layer, group)
        return y

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._config.norm_eps)


def _read_layers(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[_Layer]:
    for index in progress(range(config.layers), total=config.layers):
        prefix = f"model.layers.{index}."
        qk_norm = None
        if config.qk_norm:
            q = checkpoint.read(f"{prefix}self_attn.q_norm.weight").expand(config.heads, -1)
            k = checkpoint.read(f"{prefix}self_attn.k_norm.weight").expand(config.kv_heads, -1)
            qk_norm = torch.cat((q, k))
        yield _Layer(
            input_norm=checkpoint.read(f"{prefix}input_layernorm.weight"),
            qkv=_fused(checkpoint, prefix, "q_proj", "k_proj", "v_proj"),
            qk_norm=qk_norm,
            out=_fused(checkpoint, prefix, "o_proj"),
            mlp_norm=checkpoint.read(f"{prefix}post_attention_layernorm.weight"),
            gate_up=_fused(checkpoint, prefix, "gate_proj", "up_proj"),
            down=_fused(checkpoint, prefix, "down_proj"),
            windowed=config.windowed_layers[index],
        )


def _fused(checkpoint: Checkpoint, prefix: str, *modules: str) -> Linear:
    """Linear layers that read the same input, as one."""
    names = [module_name(prefix, module) for module in modules]
    weight = torch.cat([checkpoint.read(f"{name}.weight") for name in names])
    biased = f"{names[0]}.bias" in checkpoint
    bias = torch.cat([checkpoint.read(f"{name}.bias") for name in names]) if biased else None
    return make_linear(weight, bias)
