"""Opening files that others put there: only ordinary ones, and only below the allowed folders."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from adapter_loader.refusals import invalid, not_found

Identity = tuple[int, ...]  # of one file, or of several after one another
IDENTITY_OF_FILE = 5


def open_file(path: Path, roots: Sequence[Path] | None) -> tuple[int, os.stat_result]:
    """Open an ordinary file; Raises FileNotFoundError or RequestError.

    roots   resolved folders; a file that does not lie below one, after all links, is not found
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO must not block
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise invalid(f"{path.name} cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise invalid(f"{path.name} is not an ordinary file")
        opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # after all links
        if roots is not None and not any(opened.is_relative_to(root) for root in roots):
            raise not_found(f"{path.name} leads outside the folders that adapters may lie in")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def identity_of(status: os.stat_result) -> Identity:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # changes also when the modification time is set back
    )
