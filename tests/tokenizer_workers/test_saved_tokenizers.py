"""Tokenizers that transformers has read and saved again, as training scripts do, agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from tests.tokenizer_workers.tokenizers_for_tests import sentencepiece_like
from tokenizer_workers.compare import compare

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Made = tuple[Tokenizer, dict[str, Any]]  # and its tokenizer_config.json


def byte_level(*special: str, digits: str | None = None, **model: Any) -> Tokenizer:
    """digits: how many of them one piece may have; None: the pieces are GPT-2's."""
    vocabulary = {piece: at for at, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **model))
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)
    if digits is None:
        tokenizer.pre_tokenizer = steps
    else:
        split = pre_tokenizers.Split(Regex(WORDS % digits + REST), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, steps])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def around(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    named = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=named
    )


def gpt2() -> Made:
    tokenizer = byte_level("<|endoftext|>")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    named = {"bos_token": end, "eos_token": end, "unk_token": end}
    return tokenizer, {"tokenizer_class": "GPT2Tokenizer", **named}


def qwen2() -> Made:
    tokenizer = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>", digits="")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer, {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }


def llama3() -> Made:
    bos = "<|begin_of_text|>"
    tokenizer = byte_level(bos, "<|eot_id|>", digits="{1,3}", ignore_merges=True)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), around(tokenizer, bos)]
    )
    named = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def llama2() -> Made:
    tokenizer = sentencepiece_like()
    tokenizer.post_processor = around(tokenizer, "<s>")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **named}


@pytest.mark.parametrize("family", [gpt2, qwen2, llama3, llama2])
def test_what_transformers_saves_of_a_base_model_agrees_with_it(
    family: Callable[[], Made], tmp_path: Path
) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    base.mkdir()
    tokenizer, config = family()
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(base).save_pretrained(saved)
    assert compare(base, (saved / "tokenizer.json").read_bytes()) == ""

    longer = AutoTokenizer.from_pretrained(base)
    longer.add_tokens(["<new>"])
    longer.save_pretrained(saved)
    difference = compare(base, (saved / "tokenizer.json").read_bytes())
    assert difference.startswith("it has the token '<new>'")
