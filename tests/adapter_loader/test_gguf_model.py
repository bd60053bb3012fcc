"""A GGUF file becomes a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from adapter_loader.gguf_model import convert_gguf, model_config, tokenizer_json, unpermute

# transformers types its model classes for its own use
AutoModel: Any = transformers.AutoModelForCausalLM
AutoTokenizer: Any = transformers.AutoTokenizer

BYTE_TOKENS = ["Ġ", *"abcdefghijklmnopqrstuvwxyz0123456789?!"]


def tiny_metadata() -> dict[str, Any]:
    """One layer, 4 query heads over 2 key heads of 8, and a tokenizer of 45 tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = ["he", "Ġhe", "12"]
    tokens = special + BYTE_TOKENS + merged
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["h e", "Ġ he", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q_proj and k_proj (LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tiny_weights() -> dict[str, np.ndarray]:
    """Hugging Face names and row order."""
    random = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (45, 32),
        "model.norm": (32,),
        f"{layer}.input_layernorm": (32,),
        f"{layer}.post_attention_layernorm": (32,),
        f"{layer}.self_attn.q_proj": (32, 32),
        f"{layer}.self_attn.k_proj": (16, 32),
        f"{layer}.self_attn.v_proj": (16, 32),
        f"{layer}.self_attn.o_proj": (32, 32),
        f"{layer}.mlp.gate_proj": (64, 32),
        f"{layer}.mlp.up_proj": (64, 32),
        f"{layer}.mlp.down_proj": (32, 64),
    }
    return {
        f"{name}.weight": random.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.0.": "blk.0.",
}


def write_gguf(path: Path, metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        match value:
            case list():
                writer.add_array(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str() if key != "general.architecture":
                writer.add_string(key, value)
    for name, weight in weights.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, permute(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_row_order_of_llama_cpp_is_undone() -> None:
    weight = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    assert not np.array_equal(permute(weight, 3), weight)
    assert torch.equal(
        unpermute(torch.from_numpy(permute(weight, 3).copy()), 3), torch.from_numpy(weight)
    )


def test_a_gguf_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = tiny_weights()
    write_gguf(tmp_path / "tiny.gguf", tiny_metadata(), weights)
    convert_gguf(tmp_path / "tiny.gguf", folder)

    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(converted[name], torch.from_numpy(weight).to(torch.bfloat16)), name

    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("hi he12")) == "hi he12"


def test_epsilon_and_rope_theta_are_what_they_were_before_float32() -> None:
    config = model_config(tiny_metadata())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0


def test_digits_stand_alone_whatever_the_merges_say() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(tiny_metadata())))
    assert tokenizer.encode("he he12").tokens == ["he", "Ġhe", "1", "2"]
    assert tokenizer.encode("<|im_start|>he").tokens == ["<|im_start|>", "he"]


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="gemma"):
        model_config(tiny_metadata() | {"general.architecture": "gemma"})


def test_another_pre_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="qwen2"):
        tokenizer_json(tiny_metadata() | {"tokenizer.ggml.pre": "qwen2"})
