"""The fixtures of the whole server and its oracle."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers.utils import logging as transformers_logging

from pipeline.config import DEFAULT_MODEL
from tests.end_to_end import tiny
from tests.end_to_end.oracle import KINDS, Oracle, make_adapters
from tests.end_to_end.server import Server

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def model_folder() -> Path:
    command = [sys.executable, "-m", "adapter_loader.base_model", "--model-id", DEFAULT_MODEL]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


@pytest.fixture(scope="session")
def adapter_root(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter of each of KINDS."""
    root = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of fan_in_fan_out and the like
        make_adapters(model_folder, root)
    return root


@pytest.fixture(scope="session")
def oracle(model_folder: Path, adapter_root: Path) -> Oracle:
    return Oracle(model_folder, {name: adapter_root / name for name in KINDS})


@pytest.fixture(scope="module")
def serve(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> Iterator[Callable[..., Server]]:
    """Start servers; they are stopped when the module's tests are done."""
    started: list[tuple[Server, Path]] = []

    def start(**settings: Any) -> Server:
        folder = Path(tmp_path_factory.mktemp("s"))
        server = Server(folder, **{"model_folder": model_folder, **settings})
        started.append((server, folder))
        return server.wait_until_ready()

    yield start
    for server, folder in started:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def serve_tiny(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """Start a server of a tiny random model in fp32, with adapters of these names."""

    def start(*adapters: str, **settings: Any) -> Server:
        folder = tmp_path_factory.mktemp("tiny")
        model = tiny.make_model(folder / "model", model_folder)
        for seed, name in enumerate(adapters, start=1):
            tiny.make_adapter(folder / "root" / name, model, seed)
        found = {"model_folder": model, "adapter_root": folder / "root", "dtype": "float32"}
        return serve(**{**found, **settings})

    return start


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's, of the module's server."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
def run_serve() -> Callable[..., tuple[int, str]]:
    """Run `loradex serve` with flags, for starts that end at once: its status and output."""

    def run(*flags: str) -> tuple[int, str]:
        result = subprocess.run(
            [sys.executable, "-m", "pipeline.launch", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout

    return run
