"""Models that several tests use, made once."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from gpu_worker.worker import Worker
from pipeline.messages import PlaceAdapter
from pipeline.model_config import read_model_config
from tests.gpu_worker.driving import make_worker
from tests.gpu_worker.packing import Packed, arena_of, of_peft
from tests.gpu_worker.tiny import ADAPTERS, add_adapters, load_model, make_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> PreTrainedModel:
    return load_model(llama_folder)


@pytest.fixture(scope="session")
def peft_llama(llama_folder: Path) -> PeftModel:
    """All of ADAPTERS over the llama."""
    return add_adapters(load_model(llama_folder))


@pytest.fixture(scope="session")
def packed_adapters(llama_folder: Path, peft_llama: PeftModel) -> list[Packed]:
    """ADAPTERS in order, so that their number is their slot."""
    config = read_model_config(llama_folder)
    shapes = config.module_shapes()
    return [of_peft(peft_llama, name, layers=config.layers, shapes=shapes) for name in ADAPTERS]


@pytest.fixture
def worker(llama_folder: Path, packed_adapters: list[Packed]) -> Worker:
    """A fresh worker on the llama, with ADAPTERS resident in slots 0, 1, ..."""
    made = make_worker(llama_folder)
    arena, copies = arena_of(packed_adapters)
    made.attach_arena(arena)
    for copy in copies:
        made.place(PlaceAdapter(copy))
    return made
