"""The host arena: one file of shared memory that adapters are staged in.

adapter_loader creates it and is its only writer; gpu_worker maps it and copies out of it. Who may
use which extent until when is settled by messages, never by what lies in the file. A loader that
has died leaves it to its successor, since the worker has it mapped, and perhaps pinned.
"""

import hashlib
import mmap
import os
import stat
from pathlib import Path

from pipeline.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 4096  # bytes; extents start on page borders


def arena_path(run_dir: Path) -> Path:
    """Where the arena of this run folder lies; the same for every process and every start."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    return SHARED_MEMORY / f"loradex-{digest}"


def create(path: Path, nbytes: int) -> mmap.mmap:
    """Make the arena, and map it for writing; or a dead process's, if it is of the same size.

    It is allocated in full, so that a lack of room shows here and not as a bus error later.
    Raises ConfigError when there is no room.
    """
    descriptor = _left_behind(path, nbytes)
    if descriptor is None:
        path.unlink(missing_ok=True)
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
