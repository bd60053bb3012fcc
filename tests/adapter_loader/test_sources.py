"""Source `local`: folders below the roots."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import Unchanged, fetch_and_check
from adapter_loader.sources.local import LocalSource
from pipeline.messages import AdapterKey
from tests.adapter_loader.adapters import WEIGHTS, change_config

MAX_BYTES = 1 << 20
X = AdapterKey("local", "x")


def local(root: Path) -> LocalSource:
    return LocalSource(roots=[root], max_adapter_bytes=MAX_BYTES)


def identity_of(source: LocalSource, key: AdapterKey) -> tuple[int, ...]:
    files = source.fetch(key, None)
    files.close()
    return files.identity


def rewrite_config(folder: Path) -> None:
    change_config(folder, lora_alpha=9)


def rewrite_weights(folder: Path) -> None:
    """In place, as long as before, with the time set back."""
    weights = folder / WEIGHTS
    status = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_weights(folder: Path) -> None:
    shutil.copy2(folder / WEIGHTS, folder / "copy")
    (folder / "copy").rename(folder / WEIGHTS)


def replace_folder(folder: Path) -> None:
    folder.rename(folder.parent / "old")
    shutil.copytree(folder.parent / "old", folder)


@pytest.mark.parametrize(
    "change", [rewrite_config, rewrite_weights, replace_weights, replace_folder]
)
def test_a_local_adapter_that_is_changed_has_another_identity(
    change: Callable[[Path], None], copy_of: Callable[[str], Path], root: Path
) -> None:
    folder = copy_of("x")
    before = identity_of(local(root), X)
    assert identity_of(local(root), X) == before
    change(folder)
    assert identity_of(local(root), X) != before


def test_an_adapter_of_known_identity_is_not_read_again(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    copy_of("x")
    source = local(root)
    known = identity_of(source, X)
    assert fetch_and_check(X, None, known, source, base) == Unchanged()
    checked = fetch_and_check(X, None, (*known, 0), source, base)
    assert not isinstance(checked, Unchanged)
    checked.close()


def test_the_first_root_that_has_an_adapter_wins(
    copy_of: Callable[[str], Path], root: Path, tmp_path: Path
) -> None:
    copy_of("x")
    shutil.copytree(root, tmp_path / "second")
    both = LocalSource(roots=[root, tmp_path / "second"], max_adapter_bytes=MAX_BYTES)
    assert identity_of(both, X) == identity_of(local(root), X)
