"""What others on the machine, and clients, cannot reach."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Settings, load_settings
from pipeline.errors import ConfigError
from pipeline.process import run_folder

# A process that could dump a core here, whatever the limits of whoever runs the tests are.
DIES = """
import os, resource, sys
from pathlib import Path
from pipeline.privacy import keep_private
if sys.argv[1] == "private":
    keep_private()
Path("written").write_text("x")
Path("made").mkdir()
os.abort()
"""


def die(folder: Path, how: str) -> None:
    """In `folder`."""
    died = subprocess.run(
        [sys.executable, "-c", DIES, how],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: os.umask(0o022),
        capture_output=True,
    )
    assert died.returncode == -6


def test_what_is_written_is_for_the_servers_user_alone(tmp_path: Path) -> None:
    die(tmp_path, "private")
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("written", "made")}
    assert modes == {"written": 0o600, "made": 0o700}


def test_a_process_that_dies_leaves_no_core(tmp_path: Path) -> None:
    die(tmp_path, "private")
    assert {path.name for path in tmp_path.iterdir()} == {"written", "made"}


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 0])
def test_the_limit_of_cores_is_lowered_and_never_raised(limit: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard not in (resource.RLIM_INFINITY, limit):
        pytest.skip("whoever runs this may not raise the limit so far")
    asks = (
        "import resource; from pipeline.privacy import keep_private; keep_private(); "
        "print(*resource.getrlimit(resource.RLIMIT_CORE))"
    )
    told = subprocess.run(
        [sys.executable, "-c", asks],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [str(min(1, limit) if limit >= 0 else 1), str(limit)]


def roots_of(*roots: Path | str, **environment: str) -> tuple[Path, ...]:
    variables = {"LORADEX_ADAPTER_ROOT": ":".join(map(str, roots)), **environment}
    return load_settings({}, variables).adapter_roots()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("place", ["/", "/..", "LINK"])
def test_a_root_that_is_all_of_the_machine_is_refused(place: str, tmp_path: Path) -> None:
    if place == "LINK":
        (tmp_path / "link").symlink_to("/")
        place = str(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"adapter_root: / is all of this machine"):
        roots_of(place)


@pytest.mark.parametrize("place", [".", "cache", "cache/downloads", "cache/downloads/entries"])
def test_a_root_that_holds_what_others_need_a_token_for_is_refused(
    place: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for variables in ({"LORADEX_CACHE": str(cache)}, {"XDG_CACHE_HOME": str(cache)}):
        downloads = cache if "LORADEX_CACHE" in variables else cache / "loradex"
        root = tmp_path / place if downloads == cache else downloads / "downloads"
        with pytest.raises(ConfigError, match="need a token for"):
            roots_of(tmp_path / "good", root, **variables)


def test_a_root_that_holds_the_cache_of_the_hub_is_refused(tmp_path: Path) -> None:
    for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        with pytest.raises(ConfigError, match="downloaded from the hub"):
            roots_of(tmp_path, **{variable: str(tmp_path / "x"), "LORADEX_CACHE": "/elsewhere"})


def test_a_root_beside_the_caches_is_taken(tmp_path: Path, cache: Path) -> None:
    root = (tmp_path / "adapters").resolve()
    found = roots_of(root, LORADEX_CACHE=str(cache), HF_HOME=str(tmp_path / "hf"))
    assert found == (root,)


def test_a_run_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(mine)
    with pytest.raises(ConfigError, match="is not a folder of this user alone"):
        run_folder(Settings(run_dir=str(tmp_path / "run")))
