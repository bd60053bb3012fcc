"""The decoder of Llama, Mistral, Qwen2 and Qwen3, which differ only in numbers and switches."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.attention import AttentionPlan
from gpu_worker.kv_cache import KvCache
from gpu_worker.layers import DOWN, OUT, QKV, LayerOps, Linears
from gpu_worker.layers.linear import Linear, make_linear
from gpu_worker.weights import EMBEDDING, LM_HEAD, NORM, Checkpoint, module_name
from pipeline.model_config import ModelConfig
from pipeline.progress import progress


class Pass(NamedTuple):
    """What one forward pass is given.

    sampled  int64[sampled], the tokens whose logits are wanted; None: all
    enter    called with each layer's number before anything of it is launched
    read     called with what the logits of all tokens are made of: [tokens, hidden] and the LM head
    """

    token_ids: Tensor  # int64[tokens]
    sampled: Tensor | None
    ops: LayerOps
    attention: AttentionPlan
    kv_cache: KvCache
    linears: Linears
    enter: Callable[[int], None] | None = None
    read: Sequence[Callable[[Tensor, Linear], None]] = ()


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
    """The base model. Owns its weights; what a pass writes is the KV cache that it is given."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._embedding = checkpoint.read(EMBEDDING)
        self._layers = list(_read_layers(config, checkpoint))
        self._norm = checkpoint.read(NORM)
        tied = config.tied_embeddings
        self._lm_head = make_linear(self._embedding if tied else checkpoint.read(LM_HEAD))

    def forward(self, step: Pass) -> Tensor:
        """Run the tokens of a step. Returns logits [sampled, vocabulary] in the compute dtype."""
        residual = F.embedding(step.token_ids, self._embedding)
        x = step.ops.norm(residual, self._layers[0].input_norm)
        after = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, after, strict=True)):
            if step.enter is not None:
                step.enter(index)
            x = step.ops.add_norm(self._attention(index, layer, x, step), residual, layer.mlp_norm)
            x = step.ops.add_norm(self._mlp(index, layer, x, step), residual, next_norm)
        for read in step.read:
            read(x, self._lm_head)
        if step.sampled is not None:
            x = x.index_select(0, step.sampled)
        return self._lm_head(x) if len(x) else x.new_empty((0, self._config.vocabulary))

    def _attention(self, index: int, layer: _Layer, x: Tensor, step: Pass) -> Tensor:
        heads, rotated = self._config.heads, self._config.heads + self._config.kv_heads
        qkv = step.linears.apply(layer.qkv, x, index, QKV)
        qkv = qkv.view(-1, rotated + self._config.kv_heads, self._config.head_dim)
        step.ops.rotate_and_store(index, qkv, layer.qk_norm)
        attended = step.attention.attend(
            qkv[:, :heads],
            qkv[:, heads:rotated],
            qkv[:, rotated:],
            step.kv_cache.layer(index),
            layer.windowed,
        )
        return step.linears.apply(layer.out, attended, index, OUT)

    def _mlp(self, index: int, layer: _Layer, x: Tensor, step: Pass) -> Tensor:
        act = step.linears.gated(layer.gate_up, x, index, step.ops)
        return step.linears.apply(layer.down, act, index, DOWN)


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
