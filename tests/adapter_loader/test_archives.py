"""Adapters in archives, and archives that are not what they seem."""

import gzip
import io
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_loader.remote.archive import ARCHIVES, MAX_MEMBERS, unpack
from adapter_loader.sources import PICKLE_FILE
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.remote_parts import assert_refused, http_source, parts, weights_of
from tests.adapter_loader.web_server import Served, web_server

GOOD = {CONFIG: b"{}", WEIGHTS: b"weights"}
MAX_BYTES = 1 << 16


def archive_bytes(suffix: str, files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:" if suffix == ".tar" else "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpacked(folder: Path, suffix: str, data: bytes) -> dict[str, bytes]:
    archive = folder / "archive"
    archive.write_bytes(data)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    unpack(archive, suffix, out, MAX_BYTES, lambda nbytes: None)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def refusal(folder: Path, suffix: str, data: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        unpacked(folder, suffix, data)
    assert caught.value.kind == FailureKind.ADAPTER_INVALID
    left = {path.name for path in folder.iterdir()}
    assert left <= {"archive", "out"}, "nothing is written beside"
    return caught.value.message


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("place", ["", "./", "some/folder/"])
def test_the_adapters_two_files_are_taken_out(suffix: str, place: str, tmp_path: Path) -> None:
    files = {place + name: content for name, content in GOOD.items()}
    data = archive_bytes(suffix, {"README.md": b"hello", **files, f"{place}x.bin": b"x"})
    assert unpacked(tmp_path, suffix, data) == GOOD


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_on_a_web_server_is_fetched_once(
    suffix: str, good_adapter: Path, tmp_path: Path
) -> None:
    files = {name: (good_adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    with web_server() as server:
        server.files[f"/a{suffix}"] = Served(archive_bytes(suffix, files), cut_at=[3000])
        source = http_source(parts(tmp_path / "cache", server.url), server.url)
        key = AdapterKey("http", f"{server.url}/a{suffix}")
        for _ in range(2):
            assert weights_of(source, key) == files[WEIGHTS]
        assert server.gets() == [f"/a{suffix} -", f"/a{suffix} bytes=3000-"]
        left = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
        assert left == [CONFIG, WEIGHTS]
        missing = AdapterKey("http", f"{server.url}/b{suffix}")
        assert_refused(source, missing, FailureKind.ADAPTER_NOT_FOUND, "no such archive")


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({CONFIG: b"{}"}, f"has no {WEIGHTS}"),
        ({WEIGHTS: b"w"}, f"has no {CONFIG}"),
        ({CONFIG: b"{}", PICKLE_FILE: b"p"}, "torch.load"),
        ({**GOOD, "../evil": b"x"}, "leads outside"),
        ({**GOOD, "/etc/evil": b"x"}, "leads outside"),
        ({**GOOD, "a\\..\\evil": b"x"}, "leads outside"),
        ({**GOOD, f"b/{CONFIG}": b"x"}, f"more than one {CONFIG}"),
        ({f"a/{CONFIG}": b"{}", f"b/{WEIGHTS}": b"w"}, "different folders"),
        ({CONFIG: b"{}", WEIGHTS: bytes(MAX_BYTES + 1)}, f"at most {MAX_BYTES}"),
        ({CONFIG: bytes(1 << 21), WEIGHTS: b"w"}, "at most 1048576"),
        ({**GOOD, "filler": bytes(65 << 20)}, "bytes in it"),
        ({**GOOD, **{str(number): b"" for number in range(MAX_MEMBERS)}}, "members"),
    ],
)
def test_an_archive_that_is_not_an_adapter_is_refused(
    suffix: str, files: dict[str, bytes], word: str, tmp_path: Path
) -> None:
    assert word in refusal(tmp_path, suffix, archive_bytes(suffix, files))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo(WEIGHTS)
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    assert "link or a device" in refusal(tmp_path, ".tar", out.getvalue())


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        link = zipfile.ZipInfo(WEIGHTS)
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    assert "link or a device" in refusal(tmp_path, ".zip", out.getvalue())


def test_a_header_that_claims_an_enormous_table_is_not_believed(tmp_path: Path) -> None:
    table = tarfile.TarInfo("x")
    table.type, table.size = tarfile.XHDTYPE, 50 << 20
    data = gzip.compress(table.tobuf() + bytes(50 << 20))
    assert "too large" in refusal(tmp_path, ".tar.gz", data)


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_part_of_an_archive_or_none_at_all_is_refused(
    suffix: str, keep: int, tmp_path: Path
) -> None:
    whole = archive_bytes(suffix, {CONFIG: b"{}", WEIGHTS: random.Random(0).randbytes(5000)})
    part = whole[: len(whole) // 2] if keep < 0 else whole[:keep]
    assert refusal(tmp_path, suffix, part)


def test_a_zip_whose_member_lies_before_its_beginning_is_refused(tmp_path: Path) -> None:
    data = bytearray(archive_bytes(".zip", {CONFIG: b"{}", WEIGHTS: bytes(5000)}))
    end = data.rindex(b"PK\x05\x06")
    directory = int.from_bytes(data[end + 16 : end + 20], "little")
    data[end + 16 : end + 20] = (directory + 256).to_bytes(4, "little")
    assert "damaged" in refusal(tmp_path, ".zip", bytes(data))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("archive")


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from(ARCHIVES),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
)
def test_whatever_bytes_an_archive_has_it_gives_the_two_files_or_a_refusal(
    scratch: Callable[[], Path], suffix: str, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(archive_bytes(suffix, GOOD))
    for place, value in changes:
        data[place % len(data)] = value
    folder = scratch()
    try:
        names = set(unpacked(folder, suffix, bytes(data)))
    except RequestError as error:
        kind, names = error.kind, set(GOOD)
    else:
        kind = FailureKind.ADAPTER_INVALID
    assert (kind, names) == (FailureKind.ADAPTER_INVALID, set(GOOD))
    assert {path.name for path in folder.iterdir()} <= {"archive", "out"}
