"""Adapters are loaded under names, used, pinned, listed and unloaded, on a whole server."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually
from tests.metrics_page import ADDED_ON_THE_WAY, EVERY, OF_HISTOGRAMS, alias_rows, rows

KEY = "not-for-everybody"
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def root(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("administered")
    model = tiny.make_model(folder / "model", model_folder)
    for seed, name in enumerate(("one", "two", "three")):
        tiny.make_adapter(folder / "root" / name, model, seed)
    return folder / "root"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], root: Path) -> Server:
    return serve(
        environment={"LORADEX_ADMIN_API_KEY": KEY, "LORADEX_ALLOW_ADAPTER_ADMIN": "true"},
        model_folder=root.parent / "model",
        adapter_root=root,
        preload_adapter="three",
        frontends=2,
        stats_seconds=0.1,
    )


def administer(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=ADMIN, timeout=60)


def listed(server: Server) -> dict[str, dict[str, Any]]:
    """The adapters that are listed, by id."""
    reply = httpx.get(server.url + "/v1/adapters", timeout=30)
    return {one["id"]: one for one in reply.json()["data"]}


def complete(server: Server, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Hi", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(server.url + "/v1/completions", json=body, timeout=60)


def text(server: Server, model: str) -> str:
    reply = complete(server, model)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_an_adapter_is_loaded_used_pinned_listed_and_unloaded(server: Server, root: Path) -> None:
    path = str(root / "one")  # as controllers write it
    reply = administer(server, "/v1/load_lora_adapter", lora_name="sql", lora_path=path)
    assert reply.text == "Success: LoRA adapter 'sql' added successfully."
    assert listed(server)["one"]["tier"] == "device"
    again = administer(server, "/v1/load_lora_adapter", lora_name="sql", lora_path=path)
    assert again.status_code == 400

    for _ in range(8):  # both frontends know the name
        assert text(server, "sql") == text(server, "one") != text(server, "two")
    assert "sql" in [one["id"] for one in httpx.get(server.url + "/v1/models").json()["data"]]
    assert 'running_lora_adapters="' in httpx.get(server.url + "/metrics").text

    assert administer(server, "/v1/adapters/pin", id="sql").status_code == 200
    entry = listed(server)["one"]
    assert (entry["pinned"], entry["names"], entry["rank"]) == (True, ["sql"], 4)
    assert administer(server, "/v1/adapters/unpin", id="sql").status_code == 200
    assert not listed(server)["one"]["pinned"]

    reply = administer(server, "/v1/unload_lora_adapter", lora_name="sql")
    assert reply.text == "Success: LoRA adapter 'sql' removed successfully."
    entry = listed(server)["one"]
    assert (entry["tier"], entry["names"], entry["running"]) == ("disk", [], 0)
    assert administer(server, "/v1/unload_lora_adapter", lora_name="sql").status_code == 404


def test_an_unload_under_load_lets_all_that_began_end_well(server: Server, root: Path) -> None:
    path = str(root / "two")
    administer(server, "/load_lora_adapter", lora_name="busy", lora_path=path, pinned=True)
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(complete, server, "busy") for _ in range(32)]
        next(iter(running)).result()
        reply = administer(server, "/unload_lora_adapter", lora_name="busy")
        assert reply.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
        assert listed(server)["two"]["tier"] == "disk"
        statuses = {one.result().status_code for one in running}
    # what came later found no such name here, and none on the hub
    assert 200 in statuses
    assert statuses <= {200, 403, 404, 503}


def test_a_load_in_place_brings_what_has_changed(server: Server, root: Path) -> None:
    changing = root / "changing"
    shutil.copytree(root / "one", changing)
    load = {"lora_name": "changing-name", "lora_path": str(changing)}
    administer(server, "/v1/load_lora_adapter", **load)
    assert text(server, "changing-name") == text(server, "one")
    for path in (root / "two").iterdir():
        shutil.copy(path, changing / path.name)
    reply = administer(server, "/v1/load_lora_adapter", **load, load_inplace=True)
    assert reply.status_code == 200
    assert text(server, "changing-name") == text(server, "two")


def test_what_cannot_be_loaded_is_said(server: Server, root: Path) -> None:
    load = {"lora_name": "x", "lora_path": str(root / "missing")}
    for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        reply = httpx.post(server.url + path, json=load, headers=ADMIN, timeout=60)
        assert reply.status_code in (400, 404)
    assert httpx.post(server.url + path, json=load).status_code == 401


def test_what_is_preloaded_is_pinned(server: Server) -> None:
    assert eventually(lambda: listed(server).get("three", {}).get("pinned", False))


def test_a_running_server_shows_no_metric_that_the_page_does_not_list(server: Server) -> None:
    text(server, "three")
    page, aliases = rows(), alias_rows()
    assert eventually(lambda: "loradex_adapter_load_stage_seconds_sum" in metrics(server))
    for family in text_string_to_metric_families(metrics(server)):
        for sample in family.samples:
            counted = f"{family.name}_total" if family.type == "counter" else family.name
            of_process = page[EVERY] | page[sample.labels["process"]]
            row = aliases.get(counted) or of_process[counted]
            assert row.kind.replace("untyped", "unknown") == family.type
            assert row.labels == sample.labels.keys() - ADDED_ON_THE_WAY - OF_HISTOGRAMS


def metrics(server: Server) -> str:
    return httpx.get(server.url + "/metrics", timeout=30).text


def test_the_key_is_in_no_line_that_was_printed(server: Server) -> None:
    assert KEY not in server.output()
