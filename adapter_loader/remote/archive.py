"""Adapters in archives: .tar, .tar.gz and .zip, from whoever made them.

Only the adapter's files are taken out, its two and those for tokenizers, under names of our own, so
that no member's name can lead anywhere. Links and names that try are refused all the same: such an
archive is not what it seems. Sizes are bounded before anything is decompressed.
"""

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from adapter_loader.refusals import invalid, shown
from adapter_loader.sources import MAX_CONFIG_BYTES, PICKLE_FILE, PICKLE_ONLY, WEIGHTS_FILE
from adapter_loader.texts import TEXT_FILES
from pipeline.adapter_roots import CONFIG_FILE

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
MAX_MEMBERS = 1000
SLACK_BYTES = 64 << 20  # for the members beside the weights, and the archive's own bytes
CHUNK_BYTES = 1 << 20
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    ValueError,  # numbers in a header that are none
)


class _Member(NamedTuple):
    name: str
    nbytes: int
    ordinary: bool  # a file, not a link or a device
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path, suffix: str, folder: Path, max_bytes: int, reserve: Callable[[int], None]
) -> None:
    """Put adapter_config.json and adapter_model.safetensors of the archive into `folder`, and what
    lies beside them of TEXT_FILES.

    suffix     one of ARCHIVES
    max_bytes  of the weights
    reserve    called with the bytes of all of them before they are written
    raises     RequestError, or OSError of the disk
    """
    try:
        with _members(archive, suffix, max_bytes + SLACK_BYTES) as members:
            for name, member in _chosen(members, max_bytes, reserve):
                _copy(member, folder / name)
    except _DAMAGED as error:
        raise invalid("the archive is damaged, or not what its name says") from error
    except (NotImplementedError, RuntimeError) as error:  # how zipfile says them
        raise invalid("the archive is encrypted, or compressed in an unusual way") from error


def _chosen(
    members: Iterator[_Member], max_bytes: int, reserve: Callable[[int], None]
) -> Iterator[tuple[str, _Member]]:
    """The members that are wanted, in the archive's order, once all have been looked at."""
    most = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_bytes, **TEXT_FILES}
    found: dict[str, PurePosixPath] = {}
    places: dict[PurePosixPath, _Member] = {}
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            raise invalid(f"the archive has a member that leads outside it: {shown(member.name)}")
        if not member.ordinary:
            raise invalid(f"the archive has a link or a device in it: {shown(member.name)}")
        if path.name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE):
            if path.name in found:
                raise invalid(f"the archive has more than one {path.name}")
            found[path.name] = path
        if path.name in most:
            places[path] = member
    if CONFIG_FILE not in found:
        raise invalid(f"the archive has no {CONFIG_FILE}")
    if WEIGHTS_FILE not in found:
        raise invalid(PICKLE_ONLY if PICKLE_FILE in found else f"has no {WEIGHTS_FILE}")
    if len({path.parent for path in found.values()}) > 1:
        raise invalid("the adapter's files lie in different folders of the archive")
    folder = found[CONFIG_FILE].parent
    wanted = [(path.name, member) for path, member in places.items() if path.parent == folder]
    for name, member in wanted:
        if member.nbytes > most[name]:
            raise invalid(
                f"{name} has {member.nbytes} bytes, and this server takes at most {most[name]}"
            )
    reserve(sum(member.nbytes for _, member in wanted))
    yield from wanted  # forwards: what is compressed is not read twice


def _copy(member: _Member, path: Path) -> None:
    left = member.nbytes
    content = member.open()
    if content is None:
        raise invalid(f"the archive has a link or a device in it: {shown(member.name)}")
    with content, path.open("wb") as file:
        while data := content.read(min(CHUNK_BYTES, left + 1)):
            left -= len(data)
            if left < 0:
                break
            file.write(data)
    if left:
        raise invalid(f"the archive is damaged: {path.name} is not as long as it says")


@contextmanager
def _members(archive: Path, suffix: str, max_bytes: int) -> Iterator[Iterator[_Member]]:
    """All members, in order; their sizes are what the archive says, and bounded together."""
    if suffix == ".zip":
        with (
            archive.open("rb") as file,
            zipfile.ZipFile(cast(IO[bytes], _Bounded(file, max_bytes))) as opened,
        ):
            yield _bounded((_zip_member(opened, info) for info in opened.infolist()), max_bytes)
    else:
        compressed = suffix in (".tar.gz", ".tgz")
        with (
            gzip.open(archive) if compressed else archive.open("rb") as raw,
            tarfile.open(
                fileobj=cast(IO[bytes], _Bounded(cast(IO[bytes], raw), max_bytes)), mode="r:"
            ) as tar,
        ):
            yield _bounded((_tar_member(tar, info) for info in tar), max_bytes)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    ordinary = kind in (0, stat.S_IFREG, stat.S_IFDIR)
    return _Member(info.filename, info.file_size, ordinary, lambda: archive.open(info))


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    ordinary = info.isreg() or info.isdir()
    return _Member(info.name, info.size, ordinary, lambda: archive.extractfile(info))


def _bounded(members: Iterator[_Member], max_bytes: int) -> Iterator[_Member]:
    total = 0
    for count, member in enumerate(members):
        total += member.nbytes
        if count >= MAX_MEMBERS:
            raise invalid(f"the archive has more than {MAX_MEMBERS} members")
        if total > max_bytes:
            raise invalid(f"the archive has more than {max_bytes} bytes in it")
        yield member


class _Bounded(io.RawIOBase):
    """A file of which nothing large is read at once, nor anything before it or behind max_bytes.

    tarfile and zipfile read tables whole, of whatever size the archive claims for them.
    """

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes

    def read(self, nbytes: int = -1) -> bytes:
        nbytes = 2 * CHUNK_BYTES if nbytes < 0 else nbytes
        if nbytes > 2 * CHUNK_BYTES:
            raise invalid("the archive has a table of its members that is too large")
        self._check(self._file.tell())
        return self._file.read(nbytes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            if offset < 0:  # the archive claims that a member lies before its own beginning
                raise ValueError(f"negative seek position {offset}")
            self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, offset: int) -> None:
        """Before a seek, which decompresses all that lies in between."""
        if offset > self._max_bytes:
            raise invalid(f"the archive has more than {self._max_bytes} bytes in it")

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
