"""Source `hub`, against a hub on loopback."""

import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download

from adapter_loader.remote.last_seen import LastSeen
from adapter_loader.sources.hub import HubSource
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.adapter_loader.remote_parts import MAX_BYTES, TRIES, Parts, parts
from tests.adapter_loader.web_server import WebServer, web_server

ADAPTER = AdapterKey("hub", "some/adapter")
FORBIDDEN = FailureKind.ADAPTER_FORBIDDEN
INVALID = FailureKind.ADAPTER_INVALID
MISSING = FailureKind.ADAPTER_NOT_FOUND
UNAVAILABLE = FailureKind.ADAPTER_UNAVAILABLE

MakeSource = Callable[..., HubSource]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture
def storage(hub: FakeHub) -> Iterator[WebServer]:
    """Where the weights of the hub lie, as on the real one."""
    with web_server() as running:
        hub.storage = running
        yield running


@pytest.fixture
def files(good_adapter: Path) -> dict[str, bytes]:
    return {name: (good_adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def made(tmp_path: Path) -> Parts:
    return parts(tmp_path / "downloads")


@pytest.fixture
def source_of(hub: FakeHub, tmp_path: Path, made: Parts) -> MakeSource:
    def make(
        made: Parts = made,
        *,
        endpoint: str = hub.endpoint,
        offline: bool = False,
        share_token: bool = False,
        stall_seconds: float = 30,
    ) -> HubSource:
        return HubSource(
            downloads=made.downloads,
            texts=made.texts,
            max_adapter_bytes=MAX_BYTES,
            share_token=share_token,
            stall_seconds=stall_seconds,
            commits=LastSeen(tmp_path / "commits"),
            endpoint=endpoint,
            cache=tmp_path / "ordinary",
            offline=offline,
        )

    return make


def identity_of(source: HubSource) -> tuple[int, ...]:
    files = source.fetch(ADAPTER, None)
    files.close()
    return files.identity


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
    assert caught.value.kind == kind, caught.value.message
    for word in words:
        assert word in caught.value.message
    for secret in ("/tmp", "http", *([token] if token else [])):
        assert secret not in caught.value.message


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gets(requests: list[str]) -> list[str]:
    return [line for line in requests if line.startswith("GET")]


# --- what is fetched, and when -------------------------------------------------------------------


def test_a_public_adapter_is_downloaded_once_and_asked_about_each_time(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    assert fetch(source_of()) == files[WEIGHTS]
    assert sorted(gets(hub.requests)) == [f"GET {CONFIG}", f"GET {WEIGHTS}"]
    known = identity_of(source_of())
    hub.requests.clear()
    assert identity_of(source_of()) == known
    assert hub.requests == [f"HEAD {WEIGHTS}"]
    assert not (tmp_path / "ordinary").exists(), "the operator's cache is the operator's to fill"


def test_a_new_commit_is_noticed(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(dict(files))
    known = identity_of(source_of())
    repository.files[WEIGHTS] = repository.files[WEIGHTS][:-1] + b"\0"
    repository.commit = "2" * 40
    assert fetch(source_of()) == repository.files[WEIGHTS]
    assert identity_of(source_of()) != known


def test_a_commit_may_be_named(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    assert fetch(source_of(), revision="1" * 40) == files[WEIGHTS]


def test_a_branch_that_moves_on_meanwhile_gives_the_files_of_one_commit(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(dict(files))
    other = files[WEIGHTS][:-1] + b"\0"
    hub.after_first = lambda: repository.move_on("2" * 40, {**files, WEIGHTS: other})
    assert fetch(source_of()) == files[WEIGHTS]
    assert fetch(source_of()) == other


@pytest.mark.parametrize("within", ["model_weights", "model/model_weights"])
def test_a_run_of_ludwig_is_found_where_ludwig_puts_it(
    within: str, hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    run = {f"{within}/{name}": content for name, content in files.items()}
    hub.repositories[ADAPTER.id] = Repository({**run, "model/model_hyperparameters.json": b"{}"})
    assert fetch(source_of()) == files[WEIGHTS]
    assert fetch(source_of(offline=True)) == files[WEIGHTS]


# --- downloads -----------------------------------------------------------------------------------


def test_weights_come_from_where_the_hub_says_and_the_token_does_not_go_there(
    hub: FakeHub, storage: WebServer, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"})
    assert fetch(source_of(), "mine") == files[WEIGHTS]
    assert len(storage.gets()) == 1
    assert set(storage.tokens) == {""}
    assert gets(hub.requests) == [f"GET {CONFIG}"]


def test_a_download_that_was_cut_off_goes_on_where_it_was(
    hub: FakeHub, storage: WebServer, source_of: MakeSource, files: dict[str, bytes], made: Parts
) -> None:
    """If-Range would ask for the hub's version, which the storage does not know."""
    hub.repositories[ADAPTER.id] = Repository(files)
    hub.stored(ADAPTER.id, WEIGHTS).cut_at = [1000, 500]
    assert fetch(source_of()) == files[WEIGHTS]
    ranges = [line.rpartition(" ")[2] for line in storage.gets()]
    assert ranges == ["-", "bytes=1000-", "bytes=1500-"]
    assert len(made.waits) == 2


def test_what_does_not_have_the_checksum_of_the_hub_is_never_used(
    hub: FakeHub, storage: WebServer, source_of: MakeSource, files: dict[str, bytes], made: Parts
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    stored = hub.stored(ADAPTER.id, WEIGHTS)
    stored.content = bytes(len(files[WEIGHTS]))
    assert_refused(source_of(), UNAVAILABLE, "sha256")
    assert len(storage.gets()) == TRIES
    assert list((made.folder / "entries").iterdir()) == []
    stored.content = files[WEIGHTS]
    assert fetch(source_of()) == files[WEIGHTS]


def test_a_storage_that_stalls_after_its_headers_is_given_up(
    hub: FakeHub,
    storage: WebServer,
    source_of: MakeSource,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    hub.stored(ADAPTER.id, WEIGHTS).stall_at = 10
    impatient = parts(tmp_path / "downloads", stall_seconds=0.05)
    assert_refused(source_of(impatient), UNAVAILABLE, "stalled")


def test_a_hub_that_takes_requests_and_says_nothing_is_given_up(
    hub: FakeHub, source_of: MakeSource
) -> None:
    hub.stalls = True
    assert_refused(source_of(stall_seconds=0.05), UNAVAILABLE, "cannot be reached")
    assert len(hub.requests) == TRIES


def test_downloads_stay_within_the_disk_cache_and_the_least_recently_used_goes(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path
) -> None:
    one = sum(map(len, files.values()))
    folder = tmp_path / "little"
    little = source_of(parts(folder, cache_bytes=2 * one))
    for name in ("a/a", "a/b", "a/c"):
        hub.repositories[name] = Repository(files)
        little.fetch(AdapterKey("hub", name), None).close()
        assert cached_bytes(folder) <= 2 * one
    hub.requests.clear()
    little.fetch(AdapterKey("hub", "a/c"), None).close()
    assert gets(hub.requests) == []
    little.fetch(AdapterKey("hub", "a/a"), None).close()
    assert len(gets(hub.requests)) == 2
    tiny = source_of(parts(tmp_path / "tiny", cache_bytes=one - 1))
    assert_refused(tiny, INVALID, "disk_cache_bytes", repository="a/a")


def test_downloads_at_the_same_time_stay_within_the_disk_cache(
    hub: FakeHub,
    storage: WebServer,
    source_of: MakeSource,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    one = sum(map(len, files.values()))
    little = source_of(parts(tmp_path / "little", cache_bytes=2 * one - 1))
    hub.repositories[ADAPTER.id] = Repository(files)
    hub.repositories["a/b"] = Repository({**files, WEIGHTS: files[WEIGHTS][:-1] + b"\0"})
    stored = hub.stored(ADAPTER.id, WEIGHTS)
    stored.stall_at = 1000
    first = threading.Thread(target=fetch, args=(little,))
    first.start()
    assert storage.stalled.wait(30)
    assert_refused(little, UNAVAILABLE, "no room", repository="a/b")
    stored.stall_at = None
    storage.released.set()
    first.join()
    little.fetch(AdapterKey("hub", "a/b"), None).close()
    assert cached_bytes(tmp_path / "little") <= 2 * one


def test_an_adapter_that_is_too_large_is_not_downloaded(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository({**files, WEIGHTS: bytes(MAX_BYTES + 1)})
    assert_refused(source_of(), INVALID, "1048577", "at most 1048576")
    assert gets(hub.requests) == []


def test_a_hub_must_say_what_is_needed_to_check_it(
    hub: FakeHub, storage: WebServer, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files)
    hub.sizes = False
    assert_refused(source_of(), INVALID, "how large")
    hub.sizes = True
    for commit in ("", "../../x"):
        repository.commit = commit
        assert_refused(source_of(), UNAVAILABLE, "which commit")
    repository.commit, hub.wrong_commit = "1" * 40, "2" * 40
    assert_refused(source_of(), UNAVAILABLE, "changed on the hub")
    assert storage.requests == []


# --- who may read it -----------------------------------------------------------------------------


def test_what_a_token_has_read_needs_that_token_again(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"})
    source = source_of()
    assert fetch(source, "mine") == files[WEIGHTS]
    assert_refused(source, FORBIDDEN, "private")
    assert_refused(source, MISSING, "no such repository", token="other")
    offline = source_of(offline=True)
    assert fetch(offline, "mine") == files[WEIGHTS]
    assert_refused(offline, UNAVAILABLE, "HF_HUB_OFFLINE")
    assert_refused(offline, UNAVAILABLE, "HF_HUB_OFFLINE", token="other")
    assert_refused(offline, UNAVAILABLE, "HF_HUB_OFFLINE", revision="1" * 40)


def test_what_everybody_may_read_is_downloaded_once_for_all(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    hub.requests.clear()
    assert fetch(source_of(), "mine") == fetch(source_of(offline=True), "mine") == files[WEIGHTS]
    assert gets(hub.requests) == []
    repository.tokens = {"mine"}  # it is private from now on
    assert fetch(source_of(), "mine") == files[WEIGHTS]
    assert_refused(source_of(), FORBIDDEN)
    assert_refused(source_of(), MISSING, token="other")


def test_a_token_that_is_revoked_reads_nothing_more_from_the_cache(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"}, gated=True)
    source = source_of()
    fetch(source, "mine")
    repository.tokens = set()
    assert_refused(source, FORBIDDEN, "terms", token="mine")


def test_nothing_on_disk_tells_a_token_or_is_for_other_users(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"hf_mine"})
    fetch(source_of(), "hf_mine")
    digest = hashlib.sha256(b"hf_mine").hexdigest()
    for path in tmp_path.rglob("*"):
        assert "hf_mine" not in path.name
        assert digest[:8] not in path.name
        assert not path.is_file() or b"hf_mine" not in path.read_bytes()
    for folder in ("downloads/entries", "downloads/partial", "commits"):
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0


def test_a_gated_adapter_is_forbidden_without_its_token(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"}, gated=True)
    assert_refused(source_of(), FORBIDDEN, "terms")
    assert fetch(source_of(), "mine") == files[WEIGHTS]


@pytest.mark.parametrize("token", ["two words", "a line\n", "tokén", "x" * 2000])
def test_a_token_that_is_none_is_not_sent(token: str, hub: FakeHub, source_of: MakeSource) -> None:
    assert_refused(source_of(), FORBIDDEN, "token", token=token)
    assert hub.requests == []


@pytest.mark.parametrize("share", [False, True])
def test_the_servers_own_token_is_used_only_when_it_is_shared(
    share: bool,
    hub: FakeHub,
    source_of: MakeSource,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "servers")
    hub.repositories[ADAPTER.id] = Repository(files, tokens={"servers"})
    if share:
        assert fetch(source_of(share_token=True)) == files[WEIGHTS]
        assert fetch(source_of(share_token=True, offline=True)) == files[WEIGHTS]
    else:
        assert_refused(source_of(), FORBIDDEN, "private")
    assert_refused(source_of(offline=True), UNAVAILABLE, "HF_HUB_OFFLINE")


# --- the ordinary cache, and offline -------------------------------------------------------------


def fill_ordinary(hub: FakeHub, cache: Path, *names: str, **how: Any) -> None:
    """As its owner does, with the tools of the hub."""
    for name in names:
        hf_hub_download(ADAPTER.id, name, cache_dir=cache, endpoint=hub.endpoint, **how)
    hub.requests.clear()


def test_offline_what_is_cached_is_served_and_nobody_is_asked(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    hub.requests.clear()
    offline = source_of(offline=True)
    assert fetch(offline) == fetch(offline, "any-token") == files[WEIGHTS]
    assert fetch(offline, revision="1" * 40) == files[WEIGHTS]
    assert_refused(offline, UNAVAILABLE, revision="2" * 40)
    assert_refused(offline, UNAVAILABLE, repository="some/other")
    assert hub.requests == []


def test_offline_a_branch_is_what_it_was_when_the_hub_last_said_it(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    other = files[WEIGHTS][:-1] + b"\0"
    repository.move_on("2" * 40, {**files, WEIGHTS: other})
    fetch(source_of())
    offline = source_of(offline=True)
    assert fetch(offline) == other
    assert fetch(offline, revision="1" * 40) == files[WEIGHTS]


def test_what_lies_in_the_ordinary_cache_is_used_from_there_and_asked_about(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path, made: Parts
) -> None:
    repository = hub.repositories[ADAPTER.id] = Repository(files, tokens={"mine"})
    fill_ordinary(hub, tmp_path / "ordinary", CONFIG, WEIGHTS, token="mine")
    assert fetch(source_of(), "mine") == files[WEIGHTS]
    assert hub.requests == [f"HEAD {WEIGHTS}"]
    assert_refused(source_of(), FORBIDDEN)
    assert_refused(source_of(), MISSING, token="other")
    assert not made.folder.exists()
    other = files[WEIGHTS][:-1] + b"\0"
    repository.move_on("2" * 40, {**files, WEIGHTS: other})
    assert fetch(source_of(), "mine") == other
    assert fetch(source_of(offline=True), "mine") == other


def test_offline_the_ordinary_cache_is_served_as_its_owner_filled_it(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fill_ordinary(hub, tmp_path / "ordinary", CONFIG, WEIGHTS)
    assert fetch(source_of(offline=True)) == files[WEIGHTS]
    assert fetch(source_of(offline=True), "any-token", "1" * 40) == files[WEIGHTS]
    assert hub.requests == []


def test_what_the_ordinary_cache_has_in_part_is_downloaded(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fill_ordinary(hub, tmp_path / "ordinary", WEIGHTS)
    assert_refused(source_of(offline=True), UNAVAILABLE, "HF_HUB_OFFLINE")
    assert fetch(source_of()) == files[WEIGHTS]
    shutil.rmtree(tmp_path / "ordinary")
    assert fetch(source_of(offline=True)) == files[WEIGHTS]


# --- when it does not work -----------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_not_replaced_by_the_cache(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    fetch(source_of())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = source_of(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert_refused(gone, UNAVAILABLE, "cannot be reached")


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [
        (401, FORBIDDEN, 1),
        (403, FORBIDDEN, 1),
        (400, UNAVAILABLE, 1),
        (408, UNAVAILABLE, TRIES),
        (429, UNAVAILABLE, TRIES),
        (500, UNAVAILABLE, TRIES),
        (503, UNAVAILABLE, TRIES),
    ],
)
def test_what_the_hub_answers_is_told_and_what_may_pass_is_tried_again(
    status: int, kind: FailureKind, tries: int, hub: FakeHub, source_of: MakeSource
) -> None:
    hub.status = status
    assert_refused(source_of(), kind)
    assert len(hub.requests) == tries


def test_a_hub_that_wants_to_be_left_alone_for_a_while_is(
    hub: FakeHub, source_of: MakeSource, made: Parts
) -> None:
    hub.status, hub.retry_after = 429, 7
    assert_refused(source_of(), UNAVAILABLE, "429")
    assert made.waits == [7, 7]


def test_what_is_not_on_the_hub_is_not_found(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    hub.repositories[ADAPTER.id] = Repository(files)
    assert_refused(
        source_of(), MISSING, "no such repository", token="anything", repository="no/such"
    )
    assert_refused(source_of(), MISSING, "no such revision", revision="v2")
    for name in ("a/b/c", "../up", "a b", "", "/etc", "-x"):
        for offline in (False, True):
            source = source_of(offline=offline)
            assert_refused(source, MISSING, "name of a hub repository", repository=name)
    for revision in ("../main", "a..b", "/etc", "-x", "a" * 300, "a\nb", "refs/../../x"):
        assert_refused(source_of(), MISSING, "revision", revision=revision)


def test_a_repository_without_what_is_needed_is_refused(
    hub: FakeHub, source_of: MakeSource, files: dict[str, bytes]
) -> None:
    for names, kind, word in (
        ({CONFIG}, INVALID, "has no adapter_model.safetensors"),
        ({WEIGHTS}, INVALID, "has no adapter_config.json"),
        (set(), MISSING, "has no adapter_config.json"),
    ):
        kept = {name: files[name] for name in names}
        hub.repositories[ADAPTER.id] = Repository(kept)
        assert_refused(source_of(), kind, word)
    hub.repositories[ADAPTER.id] = Repository({CONFIG: b"{}", "adapter_model.bin": b"\x80"})
    assert_refused(source_of(), INVALID, "adapter_model.bin", "torch.load")
