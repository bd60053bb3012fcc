"""The host arena: one file of shared memory that adapters are staged in.

adapter_loader creates it and is its only writer; gpu_worker maps it and copies out of it. Who may
use which extent until when is settled by messages, never by what lies in the file. A loader that
has died leaves it to its successor, since the worker has it mapped, and perhaps pinned.
"""

import mmap
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from pipeline.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 4096  # bytes; extents start on page borders
LINK = "arena"  # in the run folder, which is its owner's alone


def arena_path(run_dir: Path) -> Path:
    """Where the arena of this run folder lies: the same for every process and every start, until
    it is removed. Nobody else can guess its name, and have a file there first."""
    while (path := known_arena(run_dir)) is None:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was faster
            (run_dir / LINK).symlink_to(SHARED_MEMORY / f"loradex-{secrets.token_hex(16)}")
    return path


def known_arena(run_dir: Path) -> Path | None:
    """Where it lies, or is going to; None if it has no name yet."""
    try:
        return (run_dir / LINK).readlink()
    except FileNotFoundError:
        return None


def remove_arena(run_dir: Path) -> None:
    """It and its name, if there is one; to be called when no process uses it any more."""
    path = known_arena(run_dir)
    if path is not None:
        path.unlink(missing_ok=True)
        (run_dir / LINK).unlink(missing_ok=True)


def create(path: Path, nbytes: int) -> mmap.mmap:
    """Make the arena, and map it for writing; or a dead process's, if it is of the same size.

    It is allocated in full, so that a lack of room shows here and not as a bus error later.
    Raises ConfigError when there is no room.
    """
    descriptor = _left_behind(path, nbytes)
    if descriptor is None:
        try:
            path.unlink(missing_ok=True)
        except PermissionError as error:
            raise ConfigError(f"run_dir: {path} belongs to another user; name another") from error
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return _map(descriptor, nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(
            f"arena_bytes: no room for {nbytes} bytes in {SHARED_MEMORY} ({error.strerror})"
        ) from error
    finally:
        os.close(descriptor)


def attach(path: Path, nbytes: int) -> mmap.mmap:
    """Map an arena that `create` made, for reading and for registration with a device.

    The mapping is writable because a device driver may want to pin it so; nobody but the loader
    writes to it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _left_behind(path: Path, nbytes: int) -> int | None:
    """An open arena of this size that is ours alone; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(descriptor)
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
    if ours and stat.S_IMODE(status.st_mode) == 0o600 and status.st_size == nbytes:
        return descriptor
    os.close(descriptor)
    return None


def _map(descriptor: int, nbytes: int) -> mmap.mmap:
    """With all pages, 0.07 s for each GiB: one at a time they would double the time of a load."""
    return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
