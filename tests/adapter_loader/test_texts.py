"""What lies beside the weights for tokenizers, wherever an adapter comes from."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapter_loader.remote.archive import ARCHIVES
from adapter_loader.remote.last_seen import LastSeen
from adapter_loader.remote.text_cache import TextCache
from adapter_loader.remote.text_downloads import at_once
from adapter_loader.sources import Source
from adapter_loader.sources.hub import HubSource
from adapter_loader.sources.local import LocalSource
from adapter_loader.texts import TEXT_FILES, TOKENIZER_FILE, Texts, texts_of
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, FailureKind
from tests.adapter_loader.adapters import CONFIG, WEIGHTS
from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.adapter_loader.remote_parts import MAX_BYTES, Parts, http_source, parts
from tests.adapter_loader.test_archives import archive_bytes
from tests.adapter_loader.web_server import Served, WebServer, web_server

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEXTS = {TEMPLATE: b"{{ messages }}", TOKENIZER_FILE: b'{"model": {}}', TOKENIZER_CONFIG: b"{}"}
LOCAL = AdapterKey("local", "x")
HUB = AdapterKey("hub", "some/adapter")


def texts(source: Source, key: AdapterKey, token: str | None = None) -> Texts:
    """All of it, which the source also knows to be unchanged."""
    found = source.texts(key, token, "")
    assert found is not None
    assert source.texts(key, token, found.version) is None
    assert found == texts_of(found.version, found.files)
    return found


def refusal(source: Source, key: AdapterKey, token: str | None = None) -> tuple[FailureKind, str]:
    with pytest.raises(RequestError) as caught:
        source.texts(key, token, "")
    return FailureKind(caught.value.kind), caught.value.message


# --- local ---------------------------------------------------------------------------------------


@pytest.fixture
def local(root: Path) -> LocalSource:
    return LocalSource(roots=[root], max_adapter_bytes=MAX_BYTES)


@pytest.fixture
def folder(copy_of: Callable[[str], Path]) -> Path:
    made = copy_of("x")
    for path in made.iterdir():
        if path.name in TEXT_FILES:
            path.unlink()
    return made


def test_a_folder_without_such_files_has_none(folder: Path, local: LocalSource) -> None:
    assert texts(local, LOCAL).files == {}


def test_a_folders_files_are_read_and_a_change_is_noticed(folder: Path, local: LocalSource) -> None:
    before = texts(local, LOCAL)
    for name, content in TEXTS.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("hello")
    found = texts(local, LOCAL)
    assert found.files == TEXTS
    (folder / TEMPLATE).write_bytes(b"{{ messagez }}")  # as long as before
    status = (folder / TEMPLATE).stat()
    os.utime(folder / TEMPLATE, ns=(status.st_atime_ns, 1))
    changed = texts(local, LOCAL)
    assert changed.files[TEMPLATE] == b"{{ messagez }}"
    (folder / TEMPLATE).unlink()
    without = texts(local, LOCAL)
    assert TEMPLATE not in without.files
    assert len({one.version for one in (before, found, changed, without)}) == 4


def test_a_local_adapter_that_is_not_there_is_not_found(root: Path, local: LocalSource) -> None:
    assert refusal(local, LOCAL)[0] == FailureKind.ADAPTER_NOT_FOUND
    assert refusal(local, AdapterKey("local", ".."))[0] == FailureKind.ADAPTER_NOT_FOUND


def test_a_file_that_is_too_large_no_file_or_outside_is_refused(
    folder: Path, local: LocalSource, tmp_path: Path
) -> None:
    large = folder / TEMPLATE
    with large.open("wb") as file:
        file.truncate(TEXT_FILES[TEMPLATE] + 1)
    assert refusal(local, LOCAL) == (
        FailureKind.ADAPTER_INVALID,
        "chat_template.jinja has 1048577 bytes, and 1048576 is the most",
    )
    large.unlink()
    os.mkfifo(folder / TEMPLATE)
    assert "is not an ordinary file" in refusal(local, LOCAL)[1]
    (folder / TEMPLATE).unlink()
    (tmp_path / "secret").write_text("secret")
    (folder / TEMPLATE).symlink_to(tmp_path / "secret")
    assert "leads outside the folders" in refusal(local, LOCAL)[1]


# --- http ----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


@pytest.fixture
def made(server: WebServer, tmp_path: Path) -> Parts:
    return parts(tmp_path / "cache", server.url)


def serve(server: WebServer, at: str, good_adapter: Path, **how: Any) -> dict[str, Served]:
    for name in (CONFIG, WEIGHTS):
        server.files[f"{at}/{name}"] = Served((good_adapter / name).read_bytes(), **how)
    served = {name: Served(content, **how) for name, content in TEXTS.items()}
    server.files |= {f"{at}/{name}": file for name, file in served.items()}
    return served


@pytest.mark.parametrize("within", ["", "/model_weights"])
def test_a_folder_on_a_web_server_is_asked_about_each_time_and_its_files_are_downloaded_once(
    within: str, server: WebServer, made: Parts, good_adapter: Path
) -> None:
    served = serve(server, f"/x{within}", good_adapter)
    source = http_source(made, server.url)
    key = AdapterKey("http", f"{server.url}/x")
    found = texts(source, key)
    assert found.files == TEXTS
    assert sorted(server.gets()) == sorted(f"/x{within}/{name} -" for name in TEXTS)
    server.requests.clear()
    assert texts(source, key) == found
    assert server.gets() == []
    assert len(server.requests) >= 2 * (2 + len(TEXT_FILES))

    served[TEMPLATE].content = b"other"
    again = texts(source, key)
    assert again.files == {**TEXTS, TEMPLATE: b"other"}
    assert again.version != found.version


def test_the_weights_are_not_downloaded_for_them(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    serve(server, "/x", good_adapter)
    server.files[f"/x/{WEIGHTS}"].stall_at = 10  # whoever downloads them waits for ever
    assert (
        texts(http_source(made, server.url), AdapterKey("http", f"{server.url}/x")).files == TEXTS
    )


def test_a_private_folder_is_for_its_token_alone(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    serve(server, "/x", good_adapter, token="secret")
    source = http_source(made, server.url)
    key = AdapterKey("http", f"{server.url}/x", scope="digest")
    assert texts(source, key, "secret").files == TEXTS
    for token in (None, "wrong"):
        kind, sentence = refusal(source, AdapterKey("http", f"{server.url}/x", scope="2"), token)
        assert kind == FailureKind.ADAPTER_FORBIDDEN
        assert "secret" not in sentence


def test_a_file_that_may_not_be_read_is_not_there_and_one_that_fails_is_a_failure(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    """A store that does not list what it holds answers 403 for what is not there."""
    served = serve(server, "/x", good_adapter)
    source = http_source(made, server.url)
    key = AdapterKey("http", f"{server.url}/x")
    served[TEMPLATE].statuses = [403]
    found = source.texts(key, None, "")
    assert found is not None
    assert TEMPLATE not in found.files
    served[TEMPLATE].statuses = [500]
    assert texts(source, key).files == TEXTS, "it is tried again"
    served[TEMPLATE].statuses = [500] * 10
    assert refusal(source, key)[0] == FailureKind.ADAPTER_UNAVAILABLE


def test_what_has_no_weights_is_refused_as_a_load_refuses_it(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    serve(server, "/x", good_adapter)
    source = http_source(made, server.url)
    key = AdapterKey("http", f"{server.url}/x")
    for gone in (WEIGHTS, CONFIG):
        del server.files[f"/x/{gone}"]
        with pytest.raises(RequestError) as caught:
            source.fetch(key, None)
        assert refusal(source, key) == (caught.value.kind, caught.value.message)


def test_a_file_on_a_server_that_is_too_large_is_refused_before_it_is_fetched(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    serve(server, "/x", good_adapter)[TEMPLATE].content = b" " * (TEXT_FILES[TEMPLATE] + 1)
    kind, sentence = refusal(http_source(made, server.url), AdapterKey("http", f"{server.url}/x"))
    assert kind == FailureKind.ADAPTER_INVALID
    assert "is the most" in sentence
    assert server.gets() == []


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_is_downloaded_once_for_weights_and_texts(
    suffix: str, server: WebServer, made: Parts, good_adapter: Path
) -> None:
    files = {name: (good_adapter / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    members = {**{f"in/{name}": content for name, content in {**TEXTS, **files}.items()}}
    members["in/checkpoint-1/" + TEMPLATE] = b"of another time"
    server.files[f"/x{suffix}"] = Served(archive_bytes(suffix, members))
    source = http_source(made, server.url)
    key = AdapterKey("http", f"{server.url}/x{suffix}")
    jobs: list[Callable[[], Any]] = [lambda: source.fetch(key, None), lambda: texts(source, key)]
    opened, found = at_once(jobs)
    opened.close()
    assert found.files == TEXTS
    assert server.gets() == [f"/x{suffix} -"]


def test_an_archive_with_a_file_that_is_too_large_is_refused(
    server: WebServer, made: Parts, good_adapter: Path
) -> None:
    files = {name: (good_adapter / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    files[TEMPLATE] = b" " * (TEXT_FILES[TEMPLATE] + 1)
    server.files["/x.zip"] = Served(archive_bytes(".zip", files))
    kind, sentence = refusal(
        http_source(made, server.url), AdapterKey("http", f"{server.url}/x.zip")
    )
    assert kind == FailureKind.ADAPTER_INVALID
    assert sentence.startswith("chat_template.jinja has 1048577 bytes")


# --- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


def hub_source(hub: FakeHub, folder: Path, **given: Any) -> HubSource:
    made = parts(folder / "downloads")
    return HubSource(
        downloads=made.downloads,
        texts=made.texts,
        max_adapter_bytes=MAX_BYTES,
        share_token=False,
        stall_seconds=30,
        commits=LastSeen(folder / "commits"),
        **{
            "endpoint": hub.endpoint,
            "cache": folder / "ordinary",
            "offline": False,
            **given,
        },
    )


@pytest.fixture
def repository(hub: FakeHub, good_adapter: Path) -> Repository:
    files = {name: (good_adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    hub.repositories[HUB.id] = Repository({**files, **TEXTS})
    return hub.repositories[HUB.id]


def test_a_repositorys_files_are_those_of_a_commit_and_one_question_says_that_it_is_the_same(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    source = hub_source(hub, tmp_path)
    found = source.texts(HUB, None, "")
    assert found is not None
    assert found.files == TEXTS
    hub.requests.clear()
    assert source.texts(HUB, None, found.version) is None
    assert hub.requests == [f"HEAD {WEIGHTS}"]
    assert source.texts(HUB, None, "") == found
    assert hub.requests == [f"HEAD {WEIGHTS}"] * 2, "they lie in the disk cache"

    repository.move_on("2" * 40, {**repository.files, TEMPLATE: b"other"})
    assert texts(source, HUB).files[TEMPLATE] == b"other"


def test_a_repository_without_such_files_has_none(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    for name in TEXTS:
        del repository.files[name]
    assert texts(hub_source(hub, tmp_path), HUB).files == {}


def test_a_private_repositorys_files_are_for_those_whom_the_hub_lets(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    repository.tokens = {"hf_one", "hf_two"}
    source = hub_source(hub, tmp_path)
    for token in ("hf_one", "hf_two"):
        key = AdapterKey("hub", HUB.id, scope=token)
        assert texts(source, key, token).files == TEXTS
    for stranger in (None, "hf_stranger"):
        key = AdapterKey("hub", HUB.id, scope=str(stranger))
        with pytest.raises(RequestError) as caught:
            source.fetch(key, stranger)
        assert refusal(source, key, stranger) == (caught.value.kind, caught.value.message)
    repository.tokens = {"hf_two"}
    refusal(source, AdapterKey("hub", HUB.id, scope="hf_one"), "hf_one")


def test_offline_they_come_from_the_disk_cache_for_those_who_have_read_them(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    repository.tokens = {"hf_one"}
    source = hub_source(hub, tmp_path)
    source.fetch(HUB, "hf_one").close()
    found = texts(source, HUB, "hf_one")
    offline = hub_source(hub, tmp_path, offline=True)
    hub.requests.clear()
    assert texts(offline, HUB, "hf_one") == found
    for token in (None, "hf_two"):
        kind, sentence = refusal(offline, HUB, token)
        assert kind == FailureKind.ADAPTER_UNAVAILABLE
        assert "HF_HUB_OFFLINE" in sentence
    assert hub.requests == []


def test_offline_they_come_from_the_ordinary_cache_too(
    hub: FakeHub, tmp_path: Path, good_adapter: Path
) -> None:
    snapshot = tmp_path / "ordinary" / "models--some--adapter" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    for name, content in {**TEXTS, WEIGHTS: b"", CONFIG: b"{}"}.items():
        (snapshot / name).write_bytes(content)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    assert texts(hub_source(hub, tmp_path, offline=True), HUB).files == TEXTS


def test_a_hub_that_cannot_be_reached_is_a_failure(hub: FakeHub, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        source = hub_source(hub, tmp_path, endpoint=nobody)
        assert refusal(source, HUB)[0] == FailureKind.ADAPTER_UNAVAILABLE


# --- the disk cache ------------------------------------------------------------------------------


def test_the_disk_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "texts", max_bytes=1000, most=3)
    for number, name in enumerate("abc"):
        cache.put(name, {"x": name.encode()})
        os.utime(tmp_path / "texts" / name, (number, number))
    assert cache.get("a") == {"x": b"a"}  # used
    cache.put("d", {})
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    cache.put("large", {"x": b"x" * 990})
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["large"]


def test_what_is_spoilt_on_disk_is_not_there(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "texts")
    cache.put("a", {"x": b"y"})
    (tmp_path / "texts" / "a").write_bytes(b"\xc1")
    assert cache.get("a") is None
    assert cache.get("b") is None


def test_jobs_at_once_give_results_in_order_or_the_first_error() -> None:
    def broken() -> int:
        raise ValueError("second")

    assert at_once([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(ValueError, match="second"):
        at_once([lambda: 1, broken, lambda: 3])
