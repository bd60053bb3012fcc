"""What benchmarks of a server share: model, adapters and settings become a server, rows a file."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.adapters import AdapterKind, write_adapters
from benchmarks.engine import Engine
from benchmarks.machine import commit, machine
from benchmarks.models import CONFIGS, make_model
from pipeline.config import Settings, load_settings
from pipeline.model_config import read_model_config

SHARED_MEMORY = Path("/dev/shm")
ADAPTERS = "adapters"  # the folder of the adapters, below the scene's own
STATS_SECONDS = 0.2  # how often processes report


class Scene(NamedTuple):
    """What a benchmark's server is to be."""

    model: str  # a key of models.CONFIGS
    kinds: Sequence[tuple[str, AdapterKind]]  # adapters to write, and their names
    settings: Mapping[str, Any]
    changes: Sequence[str] = ()  # of settings, NAME=VALUE, as on the command line
    distinct: int = 0  # see write_adapters
    parent: Path = SHARED_MEMORY  # where its folder is made


@contextmanager
def serving(scene: Scene) -> Iterator[Engine]:
    """Write model and adapters into a new folder and start a server; all goes with it."""
    previous = signal.signal(signal.SIGTERM, _exit)  # so that the folder goes then, too
    try:
        with tempfile.TemporaryDirectory(dir=scene.parent, prefix="loradex-bench-") as name:
            yield from _serve(scene, Path(name))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _serve(scene: Scene, folder: Path) -> Iterator[Engine]:
    settings, written = prepare(scene, folder)
    with Engine(settings, folder / "logs") as engine:
        print(
            f"{machine()}, {engine.facts['gpu_worker'].get('device_name')}, commit {commit()}; "
            f"{len(scene.kinds)} adapters written in {written:.1f} s, "
            f"ready after {engine.start_seconds:.1f} s\n",
            flush=True,
        )
        yield engine


def prepare(scene: Scene, folder: Path) -> tuple[Settings, float]:
    """Write a scene's model and adapters. Returns its settings, and the seconds that this took."""
    model = make_model(scene.model, folder)
    adapters = folder / ADAPTERS
    adapters.mkdir()
    start = time.monotonic()
    write_adapters(adapters, read_model_config(model), scene.kinds, scene.distinct)
    written = time.monotonic() - start
    settings = settings_from(
        {
            "load_format": "dummy",
            "model_folder": str(model),
            "adapter_root": [str(adapters)],
            "run_dir": f"{folder}/run",
            "stats_seconds": STATS_SECONDS,
            "loader_threads": 8,
            **scene.settings,
        },
        scene.changes,
    )
    return settings, written


def _exit(_signal: int, _frame: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def settings_from(defaults: Mapping[str, Any], changes: Sequence[str]) -> Settings:
    """Raises SystemExit for a change that is not NAME=VALUE, ConfigError for a wrong one."""
    given = dict(defaults)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise SystemExit(f"--set {change}: expected NAME=VALUE")
        given[name] = text
    return load_settings(given, {"LORADEX_CONFIG": os.devnull})


def room_in_memory(nbytes: int) -> Path:
    """A folder in memory if there is room for so much, else one on disk."""
    in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * nbytes
    return SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())


def prompt(tokens: int, vocabulary: int, generator: np.random.Generator) -> "array[int]":
    """Random, without the ids at both ends, which may be special."""
    drawn = generator.integers(3, vocabulary - 256, tokens, np.int32)
    return array("i", drawn.tobytes())


class Results:
    """What a benchmark has found, written to its file after each row."""

    def __init__(self, engine: Engine, module: str, path: Path | None) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self._head = {
            "machine": machine(),
            "device": engine.facts["gpu_worker"].get("device_name"),
            "commit": commit(),
            "command": " ".join(["python -m", module, *sys.argv[1:]]),
            "start_seconds": engine.start_seconds,
            "facts": engine.facts["gpu_worker"],
        }

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._path is not None:
            result = {**self._head, "rows": self.rows}
            self._path.write_text(json.dumps(result, indent=1) + "\n")


def common_options(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark of a server."""
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
