"""Where the base model lies."""

from pathlib import Path

import pytest

from pipeline.config import DEFAULT_MODEL, Settings
from pipeline.errors import ConfigError
from pipeline.model_folder import model_folder


def test_a_folder_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    assert model_folder(Settings(model_folder=str(tmp_path))) == tmp_path


def test_a_model_id_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(Settings(model_id=str(tmp_path))) == tmp_path


def test_a_model_that_cannot_be_had_is_named_and_the_reason_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match=f"model_id: {absent} cannot be had, see above"):
        model_folder(Settings(model_id=absent))
    assert absent in capfd.readouterr().err


def test_the_default_model_is_there_after_the_first_start() -> None:
    folder = model_folder(Settings(model_id=DEFAULT_MODEL))
    assert (folder / "tokenizer.json").is_file()
