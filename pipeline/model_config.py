"""What a base model's folder says about it, from config.json and generation_config.json alone.

Llama, Mistral, Qwen2 and Qwen3 differ only in numbers and switches, which are named here. Both
spellings are read: that of transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype).
"""

from pathlib import Path
from typing import Any

import msgspec

from pipeline.adapter_layout import MODULES, ModuleShape
from pipeline.errors import ConfigError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder. Sizes are elements; `sliding_window` counts tokens."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # rope_type llama3 or linear, with its numbers
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    windowed_layers: tuple[bool, ...]  # which layers look back only sliding_window tokens
    dtype: str  # of the checkpoint: float32, float16 or bfloat16
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def module_shapes(self) -> tuple[ModuleShape, ...]:
        """The shapes of adapter_layout.MODULES, in that order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return tuple(ModuleShape(*shapes[name]) for name in MODULES)


def read_model_config(folder: Path) -> ModelConfig:
    """Raises ConfigError, with a sentence, for what is missing or not supported."""
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    try:
        return _parse(config, generation)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model_id: {folder / 'config.json'} cannot be used: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"model_id: cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"model_id: {path} is not a JSON object: {error}") from error


def _parse(config: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    architecture = (config.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise ConfigError(
            f"model_id: architecture {architecture} is not supported; these are: "
            + ", ".join(FAMILIES)
        )
    if config.get("quantization_config"):
        raise ConfigError("model_id: quantised checkpoints are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"model_id: hidden_act {config['hidden_act']} is not supported")
    heads = int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    rope_theta, rope_scaling = _rope(config)
    attention_bias = bool(config.get("attention_bias", False))
    window, windowed_layers = _windows(config, family, layers)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig(
        family=family,
        layers=layers,
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=int(config["max_position_embeddings"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_window=window,
        windowed_layers=windowed_layers,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=config.get("bos_token_id"),
    )


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    parameters = config.get("rope_parameters") or {}
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    scaling = dict(config.get("rope_scaling") or parameters)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("llama3", "linear"):
        raise ConfigError(f"model_id: rope scaling {kind} is not supported")
    return theta, {**scaling, "rope_type": kind}


def _windows(
    config: dict[str, Any], family: str, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """Mistral windows every layer; Qwen those from max_window_layers on, and only if it says so."""
    window = config.get("sliding_window")
    if window is None or (family.startswith("qwen") and not config.get("use_sliding_window")):
        return None, (False,) * layers
    if config.get("layer_types"):
        windowed = tuple(kind == "sliding_attention" for kind in config["layer_types"])
    elif family.startswith("qwen"):
        first = int(config.get("max_window_layers", layers))
        windowed = tuple(layer >= first for layer in range(layers))
    else:
        windowed = (family == "mistral",) * layers
    return (int(window) if any(windowed) else None), windowed
