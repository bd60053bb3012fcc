"""What is remembered of names: across processes, up to a number, and never at anybody's cost."""

import os
from pathlib import Path

from adapter_loader.remote.last_seen import LastSeen


def test_what_a_name_meant_last_outlives_the_process(tmp_path: Path) -> None:
    LastSeen(tmp_path / "seen").put("x main", "1" * 40)
    LastSeen(tmp_path / "seen").put("x main", "2" * 40)
    seen = LastSeen(tmp_path / "seen")
    assert seen.get("x main") == "2" * 40
    assert seen.get("x v1") is None


def test_of_too_many_those_written_first_go(tmp_path: Path) -> None:
    seen = LastSeen(tmp_path, most=10)
    for number in range(10):
        seen.put(f"{number}", f"{number}")
        (path,) = (path for path in tmp_path.iterdir() if path.read_bytes() == b"%d" % number)
        os.utime(path, (number, number))
    seen.put("10", "10")
    kept = [number for number in range(11) if seen.get(f"{number}") is not None]
    assert kept == list(range(2, 11))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    seen = LastSeen(tmp_path / "file" / "seen")
    seen.put("x", "1")
    assert seen.get("x") is None


def test_a_file_that_somebody_has_spoilt_means_nothing(tmp_path: Path) -> None:
    seen = LastSeen(tmp_path)
    seen.put("x", "1")
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xff")
    assert seen.get("x") is None
    seen.put("x", "2")
    assert seen.get("x") == "2"
