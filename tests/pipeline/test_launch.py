"""`loradex serve` finds what is wrong before anything starts."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import FIELDS, Settings
from pipeline.errors import ConfigError
from pipeline.launch import check

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def settings(model: Path, **given: Any) -> Settings:
    defaults = {
        "port": 0,
        "model_id": str(model),
        "run_dir": str(model.parent / "run"),
        "arena_bytes": 4096,
        "adapter_root": (str(model.parent),),
    }
    return Settings(**{**defaults, **given})


def serve(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_can_work_comes_back_with_the_models_folder(model: Path) -> None:
    assert check(settings(model)) == settings(model, model_folder=str(model))


def test_an_adapter_root_that_is_not_there_is_named(model: Path) -> None:
    with pytest.raises(ConfigError, match=f"adapter_root: {model}/absent is not a folder"):
        check(settings(model, adapter_root=(str(model / "absent"),)))


def test_a_port_that_is_taken_is_named(model: Path, taken_port: int) -> None:
    expected = f"port: cannot listen on 127.0.0.1:{taken_port}: Address already in use"
    with pytest.raises(ConfigError, match=expected):
        check(settings(model, port=taken_port))


def test_a_host_that_does_not_exist_is_named(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"port: cannot listen on 256\.0\.0\.1:0: "):
        check(settings(model, host="256.0.0.1"))


def test_an_arena_that_has_no_room_is_refused_with_both_numbers(model: Path) -> None:
    expected = r"arena_bytes: \d+ bytes are asked for, but /dev/shm has room for \d+"
    with pytest.raises(ConfigError, match=expected):
        check(settings(model, arena_bytes=1 << 60))


def test_a_model_without_a_tokenizer_is_named(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        check(settings(model))


def test_the_command_says_what_is_wrong_in_one_sentence(model: Path) -> None:
    ended = serve("--port=http")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "loradex: port: Expected `int`, got `str`\n"


def test_a_flag_that_does_not_exist_is_refused() -> None:
    ended = serve("--potr=8080")
    assert ended.returncode == 2
    assert "unrecognized arguments: --potr=8080" in ended.stderr


def test_the_help_lists_each_setting_with_its_default() -> None:
    text = re.sub(r"\s+", " ", serve("--help").stdout)
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in text
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in text
