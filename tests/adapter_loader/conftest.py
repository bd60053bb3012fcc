"""One good adapter, made once, to be copied and spoilt."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_loader.checkpoint import BaseModel
from tests.adapter_loader.adapters import describe_base, make_adapter


@pytest.fixture(scope="session")
def good_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4, all modules of 3 layers, fp32."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own
        make_adapter(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return describe_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder.resolve()


@pytest.fixture
def copy_of(good_adapter: Path, root: Path) -> Callable[[str], Path]:
    """Put the good adapter below the root, under a name."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good_adapter, root / name))

    return copy
