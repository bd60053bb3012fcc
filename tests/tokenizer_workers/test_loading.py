"""What a model folder says about text, and the sentence for each way that it can be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from pipeline.config import Settings
from pipeline.errors import ConfigError, RequestError
from pipeline.messages import Prompt, Tools
from tests.tokenizer_workers.tokenizers_for_tests import sentencepiece_like
from tokenizer_workers.loading import load, read_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "eos_token_id": 260,  # a piece of text that nobody marked as special
}


def write_model(
    folder: Path, tokenizer: Tokenizer | None = None, **tokenizer_config: Any
) -> Settings:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tokenizer or sentencepiece_like()).save(str(folder / "tokenizer.json"))
    return Settings(model_folder=str(folder))


def test_the_context_is_the_models_unless_a_setting_says_less(tmp_path: Path) -> None:
    settings = write_model(tmp_path)
    assert load(settings).max_total_tokens == 64
    less = Settings(model_folder=settings.model_folder, max_total_tokens=32)
    assert load(less).max_total_tokens == 32


def test_a_context_greater_than_the_models_is_refused(tmp_path: Path) -> None:
    settings = write_model(tmp_path)
    with pytest.raises(ConfigError, match="max_total_tokens: 65 is more than the 64 positions"):
        load(Settings(model_folder=settings.model_folder, max_total_tokens=65))


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    write_model(tmp_path, tokenizer)
    assert len(read_tokenizer(tmp_path, {}).encode("the cat sat").ids) not in (2, 50)


def test_a_named_special_token_is_special_though_the_file_does_not_say_so(tmp_path: Path) -> None:
    settings = write_model(tmp_path, eos_token="cat", pad_token="not in the vocabulary")
    cat = sentencepiece_like().token_to_id("cat")
    model = load(settings)
    assert cat in model.vocabulary.special_ids
    assert model.new_decoder().push(cat) == ""
    assert model.new_token_decoder().push(cat) == "cat"
    size = sentencepiece_like().get_vocab_size()
    assert read_tokenizer(tmp_path, {"eos_token": "cat"}).get_vocab_size() == size


def test_the_models_end_of_text_adds_nothing_to_the_text(tmp_path: Path) -> None:
    model = load(write_model(tmp_path))
    assert 260 not in model.vocabulary.special_ids
    assert model.new_decoder().push(260) == ""
    assert model.new_token_decoder().push(260) != ""


def test_the_template_file_is_read_and_wins(tmp_path: Path) -> None:
    settings = write_model(tmp_path, chat_template="the")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    chat = [{"role": "user", "content": "cat"}]
    encoded = load(settings).encoder.encode(Prompt(request_id=1, arrived=0.0, chat=chat))
    expected = sentencepiece_like().encode("cat").ids
    assert encoded.prompt_tokens == len(expected)


def test_calls_of_tools_are_read_though_only_adapters_have_a_template(tmp_path: Path) -> None:
    model = load(write_model(tmp_path))
    assert model.template_limits.tool_format == "hermes"
    tools = Tools([{"name": "look", "parameters": {"type": "object"}}])
    rendered = Prompt(request_id=1, arrived=0.0, text="cat", tools=tools)
    assert model.encoder.encode(rendered).new_parser is not None
    chat = Prompt(request_id=1, arrived=0.0, chat=[{"role": "user", "content": "cat"}])
    with pytest.raises(RequestError, match="the model has no chat template"):
        model.encoder.encode(chat)


def test_what_adapters_are_compared_with_is_what_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    base = load(write_model(tmp_path, tokenizer, eos_token="cat")).base_texts
    assert base.around == ((1,), (2,))
    assert base.id_of("cat") == tokenizer.token_to_id("cat")
    assert set(base.special) == {"<unk>", "<s>", "</s>", "cat"}
    assert base.id_of("nothing") is None
    assert set(base.eos_ids) == {260}


def test_a_folder_without_a_tokenizer_configuration_will_do(tmp_path: Path) -> None:
    settings = write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(settings).vocabulary.special_ids == frozenset({0, 1, 2})


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be used"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("config.json", None, "cannot read"),
        ("chat_template.jinja", "{% if %}", "the chat template cannot be used"),
    ],
)
def test_what_is_missing_or_broken_is_named(
    tmp_path: Path, file: str, text: str | None, sentence: str
) -> None:
    settings = write_model(tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"model_id: .*{sentence}"):
        load(settings)


def test_the_default_model_has_its_special_tokens_and_its_template(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    assert len(load(Settings(model_folder=str(tmp_path))).vocabulary.special_ids) == 17
