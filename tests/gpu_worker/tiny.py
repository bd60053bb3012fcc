"""Tiny random models of each family, and PEFT adapters for them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

CONTEXT = 256
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,  # wide enough that greedy tokens differ from step to step
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.5}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama_llama3": LlamaConfig(
        **SIZES, rope_parameters={"rope_theta": 5000.0, **LLAMA3}, tie_word_embeddings=True
    ),
    "llama_linear": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **LINEAR}),
    "llama_biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_windowed": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def make_model(folder: Path, name: str, max_shard_size: str = "1GB") -> PreTrainedModel:
    """Save a random model; its biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        CONFIGS[name], dtype=torch.float32
    )
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return load_model(folder)


def load_model(folder: Path) -> PreTrainedModel:
    """The oracle; without its own fused attention, so that both sides are not the same code."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model


ADAPTERS = {
    "all_linear": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    ),
    "query_value": LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "uneven": LoraConfig(
        r=3,
        lora_alpha=9,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.k_proj": 5, "up_proj": 16},
        alpha_pattern={"layers.2.mlp.down_proj": 2},
        layers_to_transform=[0, 2],
    ),
}


def add_adapters(model: PreTrainedModel) -> PeftModel:
    """All ADAPTERS with weights that matter, by name."""
    adapted: PeftModel | None = None
    for seed, (name, config) in enumerate(ADAPTERS.items(), start=1):
        torch.manual_seed(seed)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        for parameter_name, parameter in adapted.named_parameters():
            if name in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
    assert adapted is not None
    return adapted.eval()


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
