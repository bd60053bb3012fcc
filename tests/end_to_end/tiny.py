"""A tiny random model with the default model's tokenizer, and adapters for it, good and bad."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CONTEXT = 512
WEIGHTS = "adapter_model.safetensors"


def make_model(folder: Path, tokenizer: Path, hidden: int = 64) -> Path:
    """Two layers, which step in a millisecond."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    return folder


def make_adapter(folder: Path, model: Path, seed: int = 0, *, std: float = 0.5) -> Path:
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(model)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(str(folder))
    return folder


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])


def poison(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def make_dora(folder: Path) -> None:
    change_config(folder, use_dora=True)


def garble(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"not safetensors at all" * 10)


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# name -> how to spoil a good adapter so
BAD: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "nan": poison,
    "dora": make_dora,
    "garbled": garble,
    "weightless": lose_weights,
}


def make_adapters(root: Path, model: Path, other_base: Path) -> None:
    """`good` and `better`, one of each of BAD, one for `other_base`, and a link that leads out."""
    make_adapter(root / "good", model, 1)
    make_adapter(root / "better", model, 2)
    for name, spoil in BAD.items():
        spoil(make_adapter(root / name, model, 3))
    make_adapter(root / "foreign", other_base, 4)
    outside = make_adapter(root.parent / "outside", model, 5)
    (root / "link").symlink_to(outside)
