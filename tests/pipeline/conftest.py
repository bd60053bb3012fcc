"""Random tests have no deadline: the machine is shared. And what grammars need of a model."""

from pathlib import Path

import hypothesis
import pytest
from llguidance import LLTokenizer

from pipeline.config import load_settings
from pipeline.grammars import load_vocabulary
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model's folder."""
    return model_folder(load_settings())


@pytest.fixture(scope="session")
def vocabulary(model: Path) -> LLTokenizer:
    config = read_model_config(model)
    return load_vocabulary(model, eos_token_ids=config.eos_token_ids, size=config.vocabulary)
