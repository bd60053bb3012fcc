"""Where adapters come from: local folders and a hub."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import Unchanged, fetch_and_check
from adapter_loader.remote.retries import Retries
from adapter_loader.sources.hub import HubSource
from adapter_loader.sources.local import LocalSource
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS, change_config
from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub

MAX_BYTES = 1 << 20
TRIES = 3
X = AdapterKey("local", "x")


def local(root: Path) -> LocalSource:
    return LocalSource(roots=[root], max_adapter_bytes=MAX_BYTES)


def identity_of(source: LocalSource | HubSource, key: AdapterKey) -> tuple[int, ...]:
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


# --- hub -----------------------------------------------------------------------------------------

ADAPTER = AdapterKey("hub", "some/adapter")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture
def files(good_adapter: Path) -> dict[str, bytes]:
    return {name: (good_adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def source_of(hub: FakeHub, tmp_path: Path) -> Callable[..., HubSource]:
    def make(*, offline: bool = False, share_token: bool = False) -> HubSource:
        return HubSource(
            token_caches=tmp_path / "tokens",
            max_adapter_bytes=MAX_BYTES,
            share_token=share_token,
            retries=Retries(tries=TRIES, seconds=60, sleep=lambda seconds: None),
            endpoint=hub.endpoint,
            cache=tmp_path / "cache",
            offline=offline,
        )

    return make


def fetch(source: HubSource, token: str | None = None, revision: str = "") -> bytes:
    """The weights' bytes."""
    fetched = source.fetch(AdapterKey("hub", ADAPTER.id, revision), token)
    try:
        return os.pread(fetched.weights, fetched.weights_bytes, 0)
    finally:
        fetched.close()


def assert_refused(
    source: HubSource,
    kind: FailureKind,
    *words: str,
    token: str | None = None,
    revision: str = "",
    repository: str = ADAPTER.id,
) -> None:
    with pytest.raises(RequestError) as caught:
        source.fetch(AdapterKey("hub", repository, revision), token)
    assert caught.value.kind == kind
    for word in words:
        assert word in caught.value.message
    for secret in ("/tmp", "http", *([token] if token else [])):
        assert secret not in caught.value.message


def test_a_public_adapter_is_downloaded_once_and_asked_about_each_time(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    assert fetch(source_of()) == files[WEIGHTS]
    assert sorted(line for line in hub.requests if line.startswith("GET")) == [
        f"GET {CONFIG}",
        f"GET {WEIGHTS}",
    ]
    known = identity_of(source_of(), ADAPTER)
    hub.requests.clear()
    assert identity_of(source_of(), ADAPTER) == known
    assert hub.requests == [f"HEAD {WEIGHTS}"]


def test_a_new_commit_is_noticed(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(dict(files))
    known = identity_of(source_of(), ADAPTER)
    repository.files[WEIGHTS] = repository.files[WEIGHTS][:-1] + b"\0"
    repository.commit = "2" * 40
    assert fetch(source_of()) == repository.files[WEIGHTS]
    assert identity_of(source_of(), ADAPTER) != known


def test_a_commit_may_be_named(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    assert fetch(source_of(), revision="1" * 40) == files[WEIGHTS]


def test_what_a_token_has_read_needs_that_token_again(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"})
    source = source_of()
    assert fetch(source, "mine") == files[WEIGHTS]
    forbidden = FailureKind.ADAPTER_FORBIDDEN
    assert_refused(source, forbidden, "private")
    assert_refused(source, FailureKind.ADAPTER_NOT_FOUND, "no such repository", token="other")
    offline = source_of(offline=True)
    assert fetch(offline, "mine") == files[WEIGHTS]
    assert_refused(offline, FailureKind.ADAPTER_UNAVAILABLE, "HF_HUB_OFFLINE")
    assert_refused(offline, FailureKind.ADAPTER_UNAVAILABLE, "HF_HUB_OFFLINE", token="other")


def test_a_token_that_is_revoked_reads_nothing_more_from_its_cache(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"}, gated=True)
    source = source_of()
    fetch(source, "mine")
    repository.tokens = set()
    assert_refused(source, FailureKind.ADAPTER_FORBIDDEN, "terms", token="mine")


def test_what_a_token_has_read_is_for_the_servers_user_alone(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"})
    fetch(source_of(), "mine")
    assert (tmp_path / "tokens").stat().st_mode & 0o077 == 0


def test_a_gated_adapter_is_forbidden_without_its_token(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"}, gated=True)
    assert_refused(source_of(), FailureKind.ADAPTER_FORBIDDEN, "terms")
    assert fetch(source_of(), "mine") == files[WEIGHTS]


@pytest.mark.parametrize("token", ["two words", "a line\n", "tokén", "x" * 2000])
def test_a_token_that_is_none_is_not_sent(
    token: str, hub: FakeHub, source_of: Callable[..., HubSource]
) -> None:
    assert_refused(source_of(), FailureKind.ADAPTER_FORBIDDEN, "token", token=token)
    assert hub.requests == []


@pytest.mark.parametrize("share", [False, True])
def test_the_servers_own_token_is_used_only_when_it_is_shared(
    share: bool,
    hub: FakeHub,
    source_of: Callable[..., HubSource],
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "servers")
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"servers"})
    if share:
        assert fetch(source_of(share_token=True)) == files[WEIGHTS]
    else:
        assert_refused(source_of(), FailureKind.ADAPTER_FORBIDDEN, "private")


def test_offline_what_is_cached_is_served_and_nobody_is_asked(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    hub.requests.clear()
    offline = source_of(offline=True)
    assert fetch(offline) == fetch(offline, "any-token") == files[WEIGHTS]
    assert_refused(offline, FailureKind.ADAPTER_UNAVAILABLE, repository="some/other")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_not_replaced_by_the_cache(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = HubSource(
            token_caches=tmp_path / "tokens",
            max_adapter_bytes=MAX_BYTES,
            share_token=False,
            retries=Retries(tries=TRIES, seconds=60, sleep=lambda seconds: None),
            endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}",
            cache=tmp_path / "cache",
            offline=False,
        )
        assert_refused(gone, FailureKind.ADAPTER_UNAVAILABLE, "cannot be reached")


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [
        (403, FailureKind.ADAPTER_FORBIDDEN, 1),
        (400, FailureKind.ADAPTER_UNAVAILABLE, 1),
        (500, FailureKind.ADAPTER_UNAVAILABLE, TRIES),
        (503, FailureKind.ADAPTER_UNAVAILABLE, TRIES),
    ],
)
def test_what_the_hub_answers_is_told_and_what_may_pass_is_tried_again(
    status: int, kind: FailureKind, tries: int, hub: FakeHub, source_of: Callable[..., HubSource]
) -> None:
    hub.status = status
    assert_refused(source_of(), kind, str(status))
    assert len(hub.requests) == tries


def test_what_is_not_on_the_hub_is_not_found(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    missing = FailureKind.ADAPTER_NOT_FOUND
    assert_refused(
        source_of(), missing, "no such repository", token="anything", repository="no/such"
    )
    assert_refused(source_of(), missing, "no such revision", revision="v2")
    for name in ("a/b/c", "../up", "a b", "", "/etc", "-x"):
        assert_refused(source_of(), missing, "name of a hub repository", repository=name)
    for revision in ("../main", "a..b", "/etc", "-x", "a" * 300, "a\nb", "refs/../../x"):
        assert_refused(source_of(), missing, "revision", revision=revision)


def test_a_repository_without_what_is_needed_is_refused(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    invalid = FailureKind.ADAPTER_INVALID
    for names, word in (
        ({CONFIG}, "has no adapter_model.safetensors"),
        ({WEIGHTS}, "has no adapter_config.json"),
    ):
        kept = {name: files[name] for name in names}
        hub.repositories[ADAPTER.id] = Repository(kept)
        assert_refused(source_of(), invalid, word)
    hub.repositories[ADAPTER.id] = Repository({CONFIG: b"{}", "adapter_model.bin": b"\x80"})
    assert_refused(source_of(), invalid, "adapter_model.bin", "torch.load")


def test_an_adapter_that_is_too_large_is_not_downloaded(
    hub: FakeHub, source_of: Callable[..., HubSource], files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository({**files, WEIGHTS: bytes(MAX_BYTES + 1)})
    assert_refused(source_of(), FailureKind.ADAPTER_INVALID, "1048577", "at most 1048576")
    assert hub.requests == [f"HEAD {WEIGHTS}"]
