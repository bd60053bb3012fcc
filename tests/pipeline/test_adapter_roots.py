"""Local adapters lie below a root, and no id leads out of it."""

from pathlib import Path

import pytest

from pipeline.adapter_roots import CONFIG_FILE, MAX_ID_CHARACTERS, find_local, list_local, local_id


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_an_adapter_is_found_by_its_folder_name_or_path(root: Path) -> None:
    sql, nested = adapter(root / "sql"), adapter(root / "team" / "pirate")
    assert find_local([root], "sql") == sql
    assert find_local([root], "team/pirate") == nested
    assert find_local([root], str(sql)) == sql


def test_the_first_root_that_has_it_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    only_second, both = adapter(second / "x"), adapter(first / "y")
    adapter(second / "y")
    assert find_local([first, second], "x") == only_second
    assert find_local([first, second], "y") == both


def test_an_adapter_has_one_id_however_its_path_is_written(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    adapter(first / "both")
    only_second, shadowed = adapter(second / "team" / "x"), adapter(second / "both")
    roots = [first, second]
    assert local_id(roots, "both") == local_id(roots, str(first / "both")) == "both"
    assert local_id(roots, str(only_second)) == "team/x"
    assert local_id(roots, str(shadowed)) == str(shadowed), "the short id is another adapter's"
    for other in (str(first), str(tmp_path / "c"), "absent", ""):
        assert local_id(roots, other) == other


@pytest.mark.parametrize(
    "adapter_id",
    [
        "",
        ".",
        "..",
        "../outside",
        "sql/../../outside",
        "absent",
        "empty",
        "sql\0",
        "sql\n",
        "x" * (MAX_ID_CHARACTERS + 1),
        "x" * 300,  # longer than a file name may be
    ],
)
def test_what_is_no_adapter_below_the_root_is_not_found(root: Path, adapter_id: str) -> None:
    adapter(root / "sql")
    adapter(root.parent / "outside")
    (root / "empty").mkdir()
    (root / CONFIG_FILE).write_text("{}")
    assert find_local([root], adapter_id) is None


def test_an_absolute_path_outside_is_not_found(root: Path) -> None:
    assert find_local([root], str(adapter(root.parent / "outside"))) is None


def test_a_link_that_leads_out_is_not_followed_and_one_that_stays_is(root: Path) -> None:
    (root / "out").symlink_to(adapter(root.parent / "outside"))
    (root / "in").symlink_to(adapter(root / "sql"))
    (root / "loop").symlink_to("loop")
    assert find_local([root], "out") is None
    assert find_local([root], "in") == root / "sql"
    assert find_local([root], "loop") is None


def test_a_root_with_a_name_like_another_is_another(root: Path) -> None:
    adapter(root.parent / "root2" / "sql")
    assert find_local([root], "../root2/sql") is None


def test_the_list_holds_each_adapter_once_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first / "y", first / "x", second / "x", second / "z"):
        adapter(folder)
    (first / "empty").mkdir()
    (first / "out").symlink_to(adapter(tmp_path / "outside"))
    assert list(list_local([first, second, tmp_path / "absent"])) == ["x", "y", "z"]


@pytest.mark.parametrize("within", ["model_weights", "model/model_weights"])
def test_a_run_of_ludwig_is_the_adapter_inside(tmp_path: Path, within: str) -> None:
    root = tmp_path.resolve()
    folder = root / "run" / within
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    assert find_local([root], "run") == folder
    assert list(list_local([root])) == ["run"]
