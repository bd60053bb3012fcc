"""The disk cache: what stays, what goes, and who may not be disturbed."""

import os
from pathlib import Path

import pytest

from adapter_loader.remote.disk_cache import DiskCache
from adapter_loader.remote.retries import Interrupted
from adapter_loader.sources import AdapterFiles
from pipeline.errors import RequestError
from pipeline.metrics import REGISTRY
from tests.adapter_loader.adapters import CONFIG, WEIGHTS

MAX_BYTES = 1000


def cache(folder: Path) -> DiskCache:
    return DiskCache(folder=folder, max_bytes=MAX_BYTES)


def add(kept: DiskCache, name: str, nbytes: int = 400, used: float = 0) -> None:
    with kept.filling(name) as folder:
        kept.reserve(folder, nbytes)
        (folder / CONFIG).write_bytes(b"{}")
        (folder / WEIGHTS).write_bytes(bytes(nbytes - 2))
        kept.publish(folder, name)
    path = next(path for path in folder.parent.parent.glob(f"entries/{name}"))
    os.utime(path, (used, used))


def opened(kept: DiskCache, name: str) -> AdapterFiles | None:
    return kept.open(name, MAX_BYTES)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "entries").iterdir()}


def test_an_entry_is_there_once_it_is_published(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    assert opened(kept, "a") is None
    add(kept, "a")
    files = opened(kept, "a")
    assert files is not None
    assert files.weights_bytes == 398
    files.close()


def test_metrics_say_how_full_it_is_and_what_had_to_go(tmp_path: Path) -> None:
    def figures() -> tuple[float | None, ...]:
        names = ("used_bytes", "adapters", "evictions_total")
        return tuple(REGISTRY.get_sample_value(f"loradex_disk_cache_{name}") for name in names)

    kept = cache(tmp_path)
    *_, before = figures()
    assert figures() == (0, 0, before)
    add(kept, "a", used=1)
    add(kept, "b", used=2)
    assert figures() == (800, 2, before)
    add(kept, "c", 300)
    assert before is not None
    assert figures() == (700, 2, before + 1)
    cache(tmp_path)  # started anew, over what is there
    assert figures() == (700, 2, before + 1)


def test_being_used_does_not_change_the_identity(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    add(kept, "a")
    first, second = opened(kept, "a"), opened(cache(tmp_path), "a")
    assert first is not None
    assert second is not None
    assert first.identity == second.identity
    first.close()
    second.close()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    add(kept, "a", used=1)
    add(kept, "b", used=2)
    files = opened(kept, "a")  # used now
    assert files is not None
    files.close()
    add(kept, "c", used=3)
    assert names(tmp_path) == {"a", "c"}


def test_what_is_being_read_stays_also_in_another_process(tmp_path: Path) -> None:
    kept, other = cache(tmp_path), cache(tmp_path)
    add(kept, "a", used=1)
    add(kept, "b", used=2)
    files = opened(kept, "a")
    assert files is not None
    os.utime(tmp_path / "entries" / "a", (0, 0))
    add(other, "c")
    assert names(tmp_path) == {"a", "c"}
    files.close()
    add(other, "d")
    assert "a" not in names(tmp_path)


def test_without_room_there_is_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    add(kept, "a", 600)
    files = opened(kept, "a")
    assert files is not None
    with kept.filling("b") as folder:
        with pytest.raises(RequestError, match="no room for its 500 bytes") as caught:
            kept.reserve(folder, 500)
        assert caught.value.status == 503
        with pytest.raises(RequestError, match="disk_cache_bytes") as caught:
            kept.reserve(folder, MAX_BYTES + 1)
        assert caught.value.status == 422
    files.close()
    assert names(tmp_path) == {"a"}


def test_downloads_under_way_share_the_room(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with kept.filling("a") as a:
        kept.reserve(a, 600)
        with kept.filling("b") as b:
            with pytest.raises(RequestError, match="no room"):
                kept.reserve(b, 500)
            kept.reserve(b, 400)
    with kept.filling("c") as c:
        kept.reserve(c, MAX_BYTES)


def test_a_part_is_kept_until_its_room_is_needed(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with kept.filling("a") as folder:
        kept.reserve(folder, 600)
        (folder / WEIGHTS).write_bytes(bytes(300))
    with cache(tmp_path).filling("a") as again:
        assert (again / WEIGHTS).stat().st_size == 300
    add(kept, "b", 900)
    assert list((tmp_path / "partial").iterdir()) == []


def test_two_who_fill_the_same_entry_do_not_write_into_one_another(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with kept.filling("a") as first:
        add(cache(tmp_path), "a")
        (first / WEIGHTS).write_bytes(b"late")
        kept.publish(first, "a")
    assert (tmp_path / "entries" / "a" / WEIGHTS).stat().st_size == 398
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize("removed", [[CONFIG], [WEIGHTS], [CONFIG, WEIGHTS]])
def test_an_entry_that_lacks_a_part_is_filled_again(removed: list[str], tmp_path: Path) -> None:
    kept = cache(tmp_path)
    add(kept, "a")
    for name in removed:
        (tmp_path / "entries" / "a" / name).unlink()
    with pytest.raises(Interrupted):
        opened(kept, "a")
    add(kept, "a")
    files = opened(kept, "a")
    assert files is not None
    files.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RequestError, match="could not be stored"),
        cache(tmp_path / "file").filling("a"),
    ):
        raise AssertionError("there is no folder")


def test_what_a_dead_process_has_left_and_nobody_can_go_on_with_is_removed(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with kept.filling("a") as whole, kept.filling("a") as private, kept.filling("b") as begun:
        (begun / WEIGHTS).write_bytes(b"half")
        names = {path.name for path in (whole, private, begun)}
        cache(tmp_path)
        assert {path.name for path in (tmp_path / "partial").iterdir()} == names  # they are in use
    for name in ("a.left", "removed-left"):
        (tmp_path / "partial" / name).mkdir()
    cache(tmp_path)
    assert {path.name for path in (tmp_path / "partial").iterdir()} == {"a", "b"}
    assert (tmp_path / "partial" / "b" / WEIGHTS).read_bytes() == b"half"
