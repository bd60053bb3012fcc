"""A whole server between a hub and its tenants: access that ends, content that changes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.end_to_end import tiny
from tests.end_to_end.server import Server

PRIVATE = "acme/secret"
PROMPT = "Once upon a time, in a small village, there lived a fox who had never seen the sea. " * 3
TOKENS = 12
LONG = 400  # tokens: many more steps than the answers that are waited for beside it
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Place(NamedTuple):
    """A server that asks its sources at each request, and what they hold."""

    server: Server
    hub: FakeHub
    root: Path

    def ask(self, adapter: str, token: str | None = None, **parameters: Any) -> httpx.Response:
        given = {
            "adapter_id": adapter,
            "api_token": token,
            "max_new_tokens": TOKENS,
            "ignore_eos_token": True,
            **parameters,
        }
        body = {"inputs": PROMPT, "parameters": given}
        return httpx.post(f"{self.server.url}/generate", json=body, timeout=120)

    def answer(self, adapter: str, token: str | None = None, **parameters: Any) -> str:
        reply = self.ask(adapter, token, **parameters)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["generated_text"])

    def models(self, token: str | None) -> list[str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        reply = httpx.get(f"{self.server.url}/v1/models", headers=headers, timeout=30)
        return [model["id"] for model in reply.json()["data"]]


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model", model_folder)


@pytest.fixture(scope="module")
def contents(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that answer differently, to be put under any name."""
    folder = tmp_path_factory.mktemp("contents")
    names = ("first", "second")
    return {name: tiny.make_adapter(folder / name, model, at) for at, name in enumerate(names)}


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server],
    model: Path,
    contents: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    for name, content in contents.items():
        shutil.copytree(content, folder / "root" / name)
    with fake_hub() as hub:
        server = serve(
            environment={"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf")},
            model_folder=model,
            adapter_root=folder / "root",
            cache=folder / "cache",
            adapter_revalidate_seconds=0,
            failed_load_seconds=0,
        )
        yield Place(server, hub, folder / "root")


def repository(content: Path, **how: Any) -> Repository:
    return Repository({name: (content / name).read_bytes() for name in (CONFIG, WEIGHTS)}, **how)


def test_a_private_adapter_is_served_to_those_who_may_read_it_until_they_may_not(
    place: Place, contents: dict[str, Path]
) -> None:
    readers = {"hf_alice", "hf_bob"}
    place.hub.repositories[PRIVATE] = repository(contents["first"], tokens=readers)
    expected = place.answer("first")
    assert place.answer(PRIVATE, "hf_alice") == expected
    for stranger in (None, "hf_mallory", "hf_Alice", "hf_alice2"):
        refused = place.ask(PRIVATE, stranger)
        assert refused.status_code == 424
        assert "repository" in refused.json()["error"]
    assert place.answer(PRIVATE, "hf_bob") == expected
    readers.remove("hf_alice")  # while it is resident for both
    assert place.ask(PRIVATE, "hf_alice").status_code == 424
    assert place.answer(PRIVATE, "hf_bob") == expected
    readers.add("hf_alice")
    assert place.answer(PRIVATE, "hf_alice") == expected


def test_a_merge_needs_access_to_each_of_its_parts(place: Place, contents: dict[str, Path]) -> None:
    place.hub.repositories["acme/a"] = repository(contents["first"], tokens={"hf_alice"})
    place.hub.repositories["acme/b"] = repository(contents["second"])
    merge = {"ids": ["acme/a", "acme/b"], "weights": [1, 1]}
    asked: dict[str, Any] = {"adapter_source": "hub", "merged_adapters": merge}
    local = {"ids": ["first", "second"], "weights": [1, 1]}
    expected = place.answer("", merged_adapters=local, adapter_source="local")
    assert place.answer("", "hf_alice", **asked) == expected
    refused = place.ask("", "hf_bob", **asked)
    assert refused.status_code == 424
    assert "part acme/a" in refused.json()["error"]


def test_nobody_is_told_of_the_private_adapters_of_others(
    place: Place, contents: dict[str, Path]
) -> None:
    place.hub.repositories["acme/plan"] = repository(contents["first"], tokens={"hf_alice"})
    place.answer("acme/plan", "hf_alice")
    assert "acme/plan" in place.models("hf_alice")
    for stranger in (None, "hf_bob"):
        assert "acme/plan" not in place.models(stranger)
    for path in ("/metrics", "/info", "/health"):
        assert "acme/plan" not in httpx.get(place.server.url + path, timeout=30).text


def test_new_content_on_the_hub_answers_the_next_request_and_not_from_old_kv(
    place: Place, contents: dict[str, Path]
) -> None:
    expected = {name: place.answer(name) for name in contents}
    assert len(set(expected.values())) == 2, "else the test would say nothing"
    public = place.hub.repositories["open/x"] = repository(contents["first"])
    assert [place.answer("open/x") for _ in range(2)] == [expected["first"]] * 2
    public.files = repository(contents["second"]).files
    public.commit = "2" * 40
    assert [place.answer("open/x") for _ in range(2)] == [expected["second"]] * 2
    public.commit = "1" * 40
    public.files = repository(contents["first"]).files
    assert place.answer("open/x") == expected["first"]


def test_a_request_in_flight_ends_with_the_content_it_began_with(
    place: Place, contents: dict[str, Path]
) -> None:
    expected = {name: place.answer(name, max_new_tokens=LONG) for name in contents}
    folder = Path(shutil.copytree(contents["first"], place.root / "changing"))
    body = {
        "model": "changing",
        "prompt": PROMPT,
        "max_tokens": LONG,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    url = f"{place.server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as stream:
        events = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        text = [next(events)]
        shutil.copy(contents["second"] / WEIGHTS, folder / "new")
        (folder / "new").rename(folder / WEIGHTS)
        assert expected["second"].startswith(place.answer("changing"))
        text += events
    pieces = [json.loads(event)["choices"][0]["text"] for event in text if event != "[DONE]"]
    assert "".join(pieces) == expected["first"]
    assert place.answer("changing", max_new_tokens=LONG) == expected["second"]
