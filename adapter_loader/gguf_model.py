"""From a GGUF file to a Hugging Face folder: config, weights and tokenizer.

For Llama models with a byte-level BPE; anything else is a ValueError. The names of the metadata are
those of the GGUF specification, the order of q and k rows that of llama.cpp's converter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

from pipeline.progress import progress

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, weights (bf16) and tokenizer of a Llama GGUF with a byte-level BPE."""
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(metadata)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _write_json(folder / "tokenizer.json", tokenizer_json(metadata))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` from the `llama.*` metadata; the LM head is tied to the embedding."""
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"{metadata['general.architecture']} is not a Llama model")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # a float32 in the file: 9.99999975e-06 stands for 1e-05
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weights(reader: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    with progress("converting the base model", len(reader.tensors), "tensor") as shown:
        for tensor in reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                weight = unpermute(weight, heads[kind])
            weights[_hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
            shown.update(1)
    return weights


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _blk, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order that llama.cpp gives q_proj and k_proj.

    weight   [heads * head_dim, in], each head's rows as (0, half, 1, half + 1, ...): rope pairs
    returns  the same rows, each head's as (0, 1, ..., head_dim - 1): rope halves
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` for the pre-tokenizer that llama.cpp calls `smollm`: digits, then bytes."""
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"the pre-tokenizer {metadata['tokenizer.ggml.pre']} is not known")
    tokens = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, **token} for token_id, token in _special_tokens(metadata).items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _special_tokens(metadata: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pairs = zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
    )
    return {
        token_id: {"content": token, **plain, "special": True}
        for token_id, (token, kind) in enumerate(pairs)
        if kind == SPECIAL_TOKEN
    }


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    bos_token = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    eos_token = tokens[metadata["tokenizer.ggml.eos_token_id"]]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): token for token_id, token in _special_tokens(metadata).items()
        },
        "additional_special_tokens": [bos_token, eos_token],
        "bos_token": bos_token,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "model_max_length": metadata["llama.context_length"],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        # not GPT2Tokenizer, which replaces the pre-tokenizer by one that keeps digits together
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A reply ends at the end of the turn; the end of a document ends it as well."""
    end_of_turn = metadata["tokenizer.ggml.tokens"].index(END_OF_TURN)
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [end_of_turn, metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
