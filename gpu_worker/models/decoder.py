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
from gpu_worker.weights import EMBEDDING, LM_HEAD, NORM, Checkpoint, module_name
from pipeline.model_config import ModelConfig
from pipeline.progress import progress

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


class _Shared(NamedTuple):
    """What all layers of one pass use."""

    angles: tuple[Tensor, Tensor]
    places: Tensor
    kv_cache: KvCache
    attention: AttentionPlan
    lora: LoraPlan | None

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        """A group of linear layers, with each token's adapter."""
        y = linear(x)
        if self.lora is not None:
            self.lora.add(y, x, layer, group)
        return y


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
        shared = _Shared(
            angles=self._rotary.angles(batch.positions),
            places=kv_cache.places(batch.kv_slots),
            kv_cache=kv_cache,
            attention=batch.attention,
            lora=batch.lora,
        )
        for index, layer in enumerate(self._layers):
            x.add_(self._attention(index, layer, self._normed(x, layer.input_norm), shared))
            x.add_(self._mlp(index, layer, self._normed(x, layer.mlp_norm), shared))
        if not len(batch.sampled):
            return x.new_empty((0, self._config.vocabulary))
        return self._lm_head(self._normed(x.index_select(0, batch.sampled), self._norm))

    def _attention(self, index: int, layer: _Layer, x: Tensor, shared: _Shared) -> Tensor:
        heads, rotated = self._config.heads, self._config.heads + self._config.kv_heads
        fused = shared.apply(layer.qkv, x, index, QKV)
        qkv = fused.view(-1, rotated + self._config.kv_heads, self._config.head_dim)
        qk = qkv[:, :rotated]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], None, self._config.norm_eps) * layer.qk_norm)
        self._rotary.rotate(qk, shared.angles)
        shared.kv_cache.write(index, shared.places, qkv[:, heads:])
        attended = shared.attention.attend(
            qkv[:, :heads],
            qkv[:, heads:rotated],
            qkv[:, rotated:],
            shared.kv_cache.layer(index),
            layer.windowed,
        )
        return shared.apply(layer.out, attended, index, OUT)

    def _mlp(self, index: int, layer: _Layer, x: Tensor, shared: _Shared) -> Tensor:
        gate, up = shared.apply(layer.gate_up, x, index, GATE_UP).chunk(2, -1)
        return shared.apply(layer.down, F.silu(gate).mul_(up), index, DOWN)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._config.norm_eps)


def _read_layers(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[_Layer]:
    with progress("loading weights", config.layers, "layer") as shown:
        for index in range(config.layers):
            yield _read_layer(config, checkpoint, index)
            shown.update(1)


def _read_layer(config: ModelConfig, checkpoint: Checkpoint, index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    qk_norm = None
    if config.qk_norm:
        q = checkpoint.read(f"{prefix}self_attn.q_norm.weight").expand(config.heads, -1)
        k = checkpoint.read(f"{prefix}self_attn.k_norm.weight").expand(config.kv_heads, -1)
        qk_norm = torch.cat((q, k))
    return _Layer(
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
