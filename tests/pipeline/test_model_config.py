"""What config.json says, in the spellings of transformers 4 and 5, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.adapter_layout import MODULES, ModuleShape
from pipeline.errors import ConfigError
from pipeline.model_config import FAMILIES, ModelConfig, read_model_config

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spelled_4(**given: Any) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        **given,
    }


def read(folder: Path, config: dict[str, Any], **generation: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(folder)


def sentence(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, config)
    return str(caught.value)


def spelled_5(folder: Path, kind: Any, **given: Any) -> ModelConfig:
    """What is read of a configuration that the installed transformers writes."""
    config = kind(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=100,
        max_position_embeddings=256,
        **given,
    )
    config.architectures = [kind.__name__.removesuffix("Config") + "ForCausalLM"]
    config.save_pretrained(folder)
    return read_model_config(folder)


def test_each_number_of_a_llama(tmp_path: Path) -> None:
    config = read(tmp_path, spelled_4(bos_token_id=1, eos_token_id=2))
    assert config == ModelConfig(
        family="llama",
        layers=3,
        hidden=64,
        intermediate=96,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=100,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        max_positions=256,
        tied_embeddings=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        windowed_layers=(False,) * 3,
        dtype="bfloat16",
        eos_token_ids=(2,),
        bos_token_id=1,
    )


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_each_family_is_read_as_transformers_writes_it(
    tmp_path: Path, kind: type[PretrainedConfig]
) -> None:
    config = spelled_5(tmp_path, kind, sliding_window=None, tie_word_embeddings=True)
    assert config.family == FAMILIES[kind.__name__.removesuffix("Config") + "ForCausalLM"]
    assert (config.layers, config.hidden, config.heads, config.kv_heads) == (3, 64, 4, 2)
    assert config.head_dim == (128 if kind is Qwen3Config else 16)
    assert config.qkv_bias == (kind is Qwen2Config)
    assert config.qk_norm == (kind is Qwen3Config)
    assert not config.out_bias
    assert config.tied_embeddings
    assert config.rope_scaling is None


def test_both_spellings_of_llama_3s_rope_say_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, spelled_4(rope_scaling=LLAMA_3_ROPE))
    new = spelled_5(tmp_path, LlamaConfig, rope_parameters={**LLAMA_3_ROPE, "rope_theta": 500000.0})
    for config in (old, new):
        assert config.rope_theta == 500000.0
        assert config.rope_scaling is not None
        assert {key: config.rope_scaling[key] for key in LLAMA_3_ROPE} == LLAMA_3_ROPE


def test_linear_rope_is_known_by_its_old_name_too(tmp_path: Path) -> None:
    config = read(tmp_path, spelled_4(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == {"type": "linear", "rope_type": "linear", "factor": 2.0}


def test_mistral_windows_all_its_layers(tmp_path: Path) -> None:
    config = spelled_5(tmp_path, MistralConfig, sliding_window=32)
    assert (config.sliding_window, config.windowed_layers) == (32, (True,) * 3)


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_qwen_windows_its_last_layers_and_only_if_it_says_so(
    tmp_path: Path, kind: type[PretrainedConfig]
) -> None:
    given = {"sliding_window": 32, "max_window_layers": 2}
    config = spelled_5(tmp_path, kind, use_sliding_window=True, **given)
    assert (config.sliding_window, config.windowed_layers) == (32, (False, False, True))

    config = spelled_5(tmp_path, kind, use_sliding_window=False, **given)
    assert (config.sliding_window, config.windowed_layers) == (None, (False,) * 3)


def test_qwens_old_spelling_counts_its_windowed_layers_itself(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        spelled_4(
            architectures=["Qwen2ForCausalLM"],
            use_sliding_window=True,
            sliding_window=32,
            max_window_layers=1,
        ),
    )
    assert (config.sliding_window, config.windowed_layers) == (32, (False, True, True))


def test_the_generation_configuration_says_where_texts_end(tmp_path: Path) -> None:
    config = read(tmp_path, spelled_4(eos_token_id=2), eos_token_id=[5, 6])
    assert config.eos_token_ids == (5, 6)
    assert read(tmp_path, spelled_4(), bos_token_id=1).eos_token_ids == ()


def test_the_biases_are_where_the_family_has_them(tmp_path: Path) -> None:
    llama = read(tmp_path, spelled_4(attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, True)
    qwen = read(tmp_path, spelled_4(architectures=["Qwen2ForCausalLM"]))
    assert (qwen.qkv_bias, qwen.out_bias, qwen.mlp_bias) == (True, False, False)


def test_the_shapes_are_those_of_the_weights(tmp_path: Path) -> None:
    shapes = read(tmp_path, spelled_4(head_dim=24)).module_shapes()
    assert dict(zip(MODULES, shapes, strict=True)) == {
        "q_proj": ModuleShape(96, 64),
        "k_proj": ModuleShape(48, 64),
        "v_proj": ModuleShape(48, 64),
        "o_proj": ModuleShape(64, 96),
        "gate_proj": ModuleShape(96, 64),
        "up_proj": ModuleShape(96, 64),
        "down_proj": ModuleShape(64, 96),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope scaling yarn is not supported"),
        ({"hidden_size": "wide"}, "config.json cannot be used: invalid literal for int()"),
        ({"vocab_size": None}, "config.json cannot be used: int() argument must be"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, given: dict[str, Any], expected: str
) -> None:
    text = sentence(tmp_path, spelled_4(**given))
    assert text.startswith("model_id: ")
    assert expected in text


def test_a_missing_number_is_named(tmp_path: Path) -> None:
    config = spelled_4()
    del config["num_hidden_layers"]
    assert "num_hidden_layers" in sentence(tmp_path, config)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
        read_model_config(tmp_path)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        read_model_config(tmp_path)
