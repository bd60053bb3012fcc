"""The host arena: one file of shared memory that adapters are staged in.

adapter_loader creates it and is its only writer; gpu_worker maps it and copies out of it. Who may
use which extent until when is settled by messages, never by what lies in the file.
"""

import hashlib
import mmap
import os
from pathlib import Path

from pipeline.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 4096  # bytes; extents start on page borders


def arena_path(run_dir: Path) -> Path:
    """Where the arena of this run folder lies; the same for every process and every start."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    return SHARED_MEMORY / f"loradex-{digest}"


def create(path: Path, nbytes: int) -> mmap.mmap:
    """Make the arena, in place of a dead process's if there is one, and map it for writing.

    It is allocated in full, so that a lack of room shows here and not as a bus error later.
    Raises ConfigError when there is no room.
    """
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


def _map(descriptor: int, nbytes: int) -> mmap.mmap:
    """With all pages, 0.07 s for each GiB: one at a time they would double the time of a load."""
    return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
