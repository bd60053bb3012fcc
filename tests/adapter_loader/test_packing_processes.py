"""Packing in processes of its own: what it gives, what becomes of those that die, what is left."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import Checked, fetch_and_check, fill
from adapter_loader.packing_processes import Nursery, PackingProcessDiedError, PackingProcesses
from adapter_loader.sources.local import LocalSource
from pipeline.arena import create
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, Merge, MergePart, MergeStrategy
from tests.adapter_loader.adapters import make_adapter

ARENA_BYTES = 1 << 20
COUNT = 2
WAIT_SECONDS = 60


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[tuple[Path, memoryview]]:
    path = tmp_path / "arena"
    with closing(create(path, ARENA_BYTES)) as mapped, memoryview(mapped) as extents:
        yield path, extents


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with closing(Nursery()) as made:
        yield made


@pytest.fixture
def processes(nursery: Nursery, arena: tuple[Path, memoryview]) -> Iterator[PackingProcesses]:
    with closing(PackingProcesses(nursery, arena[0], ARENA_BYTES, COUNT)) as made:
        yield made


def check(root: Path, base: BaseModel, key: AdapterKey) -> Checked:
    source = LocalSource(roots=[root.resolve()], max_adapter_bytes=1 << 30)
    checked = fetch_and_check(key, None, None, source, base)
    assert isinstance(checked, Checked)
    return checked


def weights(checked: Checked) -> list[int]:
    return [files.weights for files in checked.files]


def merge_of(names: list[str]) -> AdapterKey:
    parts = tuple(MergePart(AdapterKey("local", name), 0.5) for name in names)
    return AdapterKey("local", "+".join(names), merge=Merge(parts, MergeStrategy.CAT))


def wait_for_packers(nursery: Nursery) -> list[psutil.Process]:
    """The processes that are there to pack."""
    while len(found := psutil.Process(nursery.pid).children()) < COUNT:
        threading.Event().wait(0.01)
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_what_lies_in_the_arena_is_what_is_packed_here(
    merged: bool,
    tmp_path: Path,
    base: BaseModel,
    arena: tuple[Path, memoryview],
    processes: PackingProcesses,
) -> None:
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        make_adapter(tmp_path / name, r=4)
    checked = check(tmp_path, base, merge_of(["x", "y"]) if merged else AdapterKey("local", "x"))
    nbytes = checked.plan.placed.nbytes
    expected = bytearray(nbytes)
    content = fill(checked.plan, weights(checked), memoryview(expected))
    assert processes.pack(checked.plan, weights(checked), 4096) == content
    assert bytes(arena[1][4096 : 4096 + nbytes]) == expected
    assert not any(arena[1][:4096])
    assert not any(arena[1][4096 + nbytes :])
    checked.close()


def test_a_refusal_is_the_same_as_here_and_the_next_one_is_packed(
    tmp_path: Path, base: BaseModel, processes: PackingProcesses
) -> None:
    make_adapter(tmp_path / "x")
    checked = check(tmp_path, base, AdapterKey("local", "x"))
    file = tmp_path / "x" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for _ in range(COUNT + 1):
        os.truncate(file, 3000)
        with pytest.raises(RequestError, match="changed while it was read") as refused:
            processes.pack(checked.plan, weights(checked), 0)
        assert refused.value.status == 503
        file.write_bytes(whole)
        assert processes.pack(checked.plan, weights(checked), 0)
    checked.close()


def test_a_process_that_dies_takes_its_adapter_alone_with_it(
    tmp_path: Path, base: BaseModel, nursery: Nursery, processes: PackingProcesses
) -> None:
    make_adapter(tmp_path / "x")
    checked = check(tmp_path, base, AdapterKey("local", "x"))
    reading, writing = os.pipe()  # a file that is read for ever
    busy = wait_for_packers(nursery)
    outcomes: list[type[Exception]] = []

    def pack_the_endless() -> None:
        try:
            processes.pack(checked.plan, [reading], 0)
        except (PackingProcessDiedError, RequestError, RuntimeError) as error:
            outcomes.append(type(error))

    for process in busy:
        process.send_signal(signal.SIGSTOP)
    threads = [threading.Thread(target=pack_the_endless) for _ in range(COUNT)]
    for thread in threads:
        thread.start()
    for process in busy:
        process.kill()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert outcomes == [PackingProcessDiedError] * COUNT
    for _ in range(COUNT):
        assert processes.pack(checked.plan, weights(checked), 0)
    os.close(reading)
    os.close(writing)
    checked.close()


def test_files_are_closed_there_and_nothing_is_left_at_the_end(
    tmp_path: Path, base: BaseModel, arena: tuple[Path, memoryview]
) -> None:
    make_adapter(tmp_path / "x")
    checked = check(tmp_path, base, AdapterKey("local", "x"))
    with (
        closing(Nursery()) as nursery,
        closing(PackingProcesses(nursery, arena[0], ARENA_BYTES, COUNT)) as processes,
    ):
        for _ in range(2 * COUNT):
            processes.pack(checked.plan, weights(checked), 0)
        found = wait_for_packers(nursery)
        open_files = [process.num_fds() for process in found]
        for _ in range(10 * COUNT):
            processes.pack(checked.plan, weights(checked), 0)
        assert [process.num_fds() for process in found] == open_files
    _, alive = psutil.wait_procs(found, timeout=WAIT_SECONDS)
    assert not alive
    checked.close()


def test_processes_do_not_outlive_what_has_forked_them(
    arena: tuple[Path, memoryview], nursery: Nursery
) -> None:
    with closing(PackingProcesses(nursery, arena[0], ARENA_BYTES, COUNT)):
        found = wait_for_packers(nursery)
        psutil.Process(nursery.pid).kill()
        _, alive = psutil.wait_procs(found, timeout=WAIT_SECONDS)
        assert not alive
