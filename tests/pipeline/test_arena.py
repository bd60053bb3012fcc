"""The host arena: one file of shared memory, allocated in full."""

import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.arena import (
    SHARED_MEMORY,
    arena_path,
    attach,
    create,
    known_arena,
    remove_arena,
)
from pipeline.errors import ConfigError

NBYTES = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = arena_path(tmp_path / "run")
    yield path
    path.unlink(missing_ok=True)


def test_what_the_loader_writes_is_what_the_worker_reads(path: Path) -> None:
    with create(path, NBYTES) as written, attach(path, NBYTES) as read:
        written[4096:4102] = b"weight"
        assert read[4096:4102] == b"weight"


def test_all_of_it_is_allocated_and_nobody_else_may_read_it(path: Path) -> None:
    with create(path, NBYTES):
        status = path.stat()
    assert status.st_blocks * 512 >= NBYTES
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_the_arena_of_a_dead_process_is_replaced(path: Path) -> None:
    with create(path, NBYTES) as dead:
        dead[0] = 1
        with create(path, 2 * NBYTES) as fresh:
            assert len(fresh) == 2 * NBYTES
            assert fresh[0] == 0


def test_a_lack_of_room_is_one_sentence_and_leaves_nothing(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^arena_bytes: no room for \d+ bytes in /dev/shm"):
        create(path, 1 << 55)
    assert not path.exists()


def test_an_arena_that_was_never_made_cannot_be_attached(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        attach(path, NBYTES)


def test_each_run_folder_has_its_own_arena_and_always_the_same(tmp_path: Path) -> None:
    first, second = arena_path(tmp_path / "a"), arena_path(tmp_path / "b")
    assert first != second
    assert first == arena_path(tmp_path / "b" / ".." / "a")
    assert first.parent == SHARED_MEMORY
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_a_name_is_not_given_again(tmp_path: Path) -> None:
    """Nor can it be told from the folder's."""
    run_dir = tmp_path / "run"
    names = set()
    for _ in range(2):
        names.add(arena_path(run_dir))
        with create(arena_path(run_dir), NBYTES):
            remove_arena(run_dir)
        assert known_arena(run_dir) is None
    assert len(names) == 2
    assert not any(path.exists() for path in names)
    remove_arena(run_dir)


def test_processes_that_ask_at_once_are_told_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(arena_path, [tmp_path / "run"] * 64))) == 1


def test_a_successor_takes_over_the_arena_of_a_dead_loader(path: Path) -> None:
    with create(path, NBYTES) as dead, attach(path, NBYTES) as read:
        inode = path.stat().st_ino
        dead[0] = 1
        with create(path, NBYTES) as successor:
            assert path.stat().st_ino == inode
            successor[1] = 2
            assert read[:2] == bytes([1, 2])


@pytest.mark.parametrize("strange", ["readable", "link", "folder"])
def test_what_is_not_an_arena_of_ours_is_not_taken_over(
    path: Path, tmp_path: Path, strange: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(NBYTES))
    victim.chmod(0o600)
    match strange:
        case "readable":
            path.write_bytes(bytes(NBYTES))
            path.chmod(0o644)
        case "link":
            path.symlink_to(victim)
        case "folder":
            path.mkdir()
            with pytest.raises(OSError, match="directory"):
                create(path, NBYTES)
            path.rmdir()
            return
    with create(path, NBYTES) as arena:
        arena[0] = 1
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert victim.read_bytes() == bytes(NBYTES)
