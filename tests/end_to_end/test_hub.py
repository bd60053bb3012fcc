"""A whole server between its clients, a hub, and the storage that the hub leads to."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.adapter_loader.web_server import WebServer, web_server
from tests.end_to_end import tiny
from tests.end_to_end.server import Server

FILES = ("adapter_config.json", "adapter_model.safetensors")
STALL_SECONDS = 3.0
TRIES = 2


class Place(NamedTuple):
    server: Server
    hub: FakeHub
    storage: WebServer
    cache: Path
    cache_bytes: int

    def complete(self, model: str, **body: Any) -> httpx.Response:
        asked = {"model": model, "prompt": "Hi", "max_tokens": 4, "temperature": 0, **body}
        return httpx.post(f"{self.server.url}/v1/completions", json=asked, timeout=60)

    def administer(self, verb: str, **body: Any) -> httpx.Response:
        url = f"{self.server.url}/v1/{verb}_lora_adapter"
        return httpx.post(url, json=body, timeout=60)


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    model = tiny.make_model(folder / "model", model_folder)
    with web_server() as storage, fake_hub() as hub:
        hub.storage = storage
        nbytes = 0
        for seed, name in enumerate(("good", "stalling", "third", "fourth")):
            made = tiny.make_adapter(folder / name, model, seed)
            files = {name: (made / name).read_bytes() for name in FILES}
            hub.repositories[f"org/{name}"] = Repository(files)
            nbytes = max(nbytes, sum(map(len, files.values())))
        server = serve(
            environment={
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(folder / "hf"),
                "LORADEX_ALLOW_ADAPTER_ADMIN": "true",
            },
            model_folder=model,
            cache=folder / "cache",
            disk_cache_bytes=2 * nbytes + 100,
            source_stall_seconds=STALL_SECONDS,
            source_tries=TRIES,
            failed_load_seconds=0,
        )
        yield Place(server, hub, storage, folder / "cache", 2 * nbytes + 100)


def test_a_storage_that_stalls_holds_up_nobody_else_and_ends_in_a_sentence(place: Place) -> None:
    stored = place.hub.stored("org/stalling", FILES[1])
    stored.stall_at = 100
    with ThreadPoolExecutor(2) as threads:
        stalled = threads.submit(place.complete, "org/stalling")
        assert place.storage.stalled.wait(30)
        load = threads.submit(place.administer, "load", lora_name="name", lora_path="org/stalling")
        assert place.complete("org/good").status_code == 200
        assert not stalled.done()
        assert stalled.result().status_code == 503
        assert stalled.result().json()["error"]["message"].endswith("the connection stalled")
        assert load.result().status_code == 503
    unload = place.administer("unload", lora_name="name")
    assert unload.status_code == 404
    assert "cannot be found" in unload.json()["error"]["message"]
    stored.stall_at = None
    assert place.complete("org/stalling").status_code == 200


def test_what_is_downloaded_stays_within_the_disk_cache(place: Place) -> None:
    for name in ("good", "third", "fourth", "good"):
        assert place.complete(f"org/{name}").status_code == 200
        kept = (path for path in (place.cache / "downloads").rglob("*") if path.is_file())
        assert sum(path.stat().st_size for path in kept) <= place.cache_bytes


def test_what_cannot_be_merged_is_a_422_of_each_family(place: Place) -> None:
    merge = {"ids": ["org/good"], "merge_strategy": "svd"}
    reply = place.complete("", merged_adapters=merge)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == "merged_adapters.merge_strategy"
    body = {"inputs": "Hi", "parameters": {"merged_adapters": merge}}
    reply = httpx.post(f"{place.server.url}/generate", json=body, timeout=60)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
