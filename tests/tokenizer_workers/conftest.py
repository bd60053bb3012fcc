"""The default model's tokenizer, as a worker loads it."""

from pathlib import Path

import hypothesis
import pytest
from tokenizers import Tokenizer

from pipeline.config import Settings, load_settings
from pipeline.model_folder import model_folder
from tokenizer_workers.loading import TextModel, load, read_tokenizer

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def folder() -> Path:
    return model_folder(load_settings())


@pytest.fixture(scope="session")
def model(folder: Path) -> TextModel:
    return load(Settings(model_folder=str(folder)))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return read_tokenizer(folder, {})
