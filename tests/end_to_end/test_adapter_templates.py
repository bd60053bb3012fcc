"""Adapters that ship their own chat template or tokenizer, through the whole server."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from transformers import AutoTokenizer

from tests.adapter_loader.fake_hub import FakeHub, Repository, fake_hub
from tests.end_to_end import tiny
from tests.end_to_end.server import Server

MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, who are you?"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILES = ("adapter_config.json", tiny.WEIGHTS)


class Place(NamedTuple):
    """A server that asks its sources at each request, a folder of adapters, and a hub."""

    server: Server
    root: Path
    hub: FakeHub
    model: Path

    def adapter(self, name: str, **texts: str | bytes) -> Path:
        """An adapter with these files, whose names have `_` for `.`, beside its weights."""
        folder = self.root / name
        shutil.copytree(self.root / "plain", folder, dirs_exist_ok=True)
        for file, content in texts.items():
            path = folder / f"{file.rpartition('_')[0]}.{file.rpartition('_')[2]}"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    def post(self, route: str, model: str, token: str | None = None, **body: Any) -> httpx.Response:
        given = {"model": model, "max_tokens": 1, "temperature": 0, "api_token": token, **body}
        return httpx.post(f"{self.server.url}/v1/{route}", json=given, timeout=60)

    def chat(self, model: str, **body: Any) -> httpx.Response:
        return self.post("chat/completions", model, **{"messages": MESSAGES, **body})

    def prompt_ids(self, adapter: str | None, text: str) -> list[int]:
        """What a chat of one message became."""
        parameters = {
            "adapter_id": adapter,
            "apply_chat_template": True,
            "max_new_tokens": 1,
            "details": True,
            "decoder_input_details": True,
        }
        body = {"inputs": text, "parameters": parameters}
        reply = httpx.post(f"{self.server.url}/generate", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return [token["id"] for token in reply.json()["details"]["prefill"]]

    def refusal(self, reply: httpx.Response, code: str = "model_invalid") -> str:
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (422, code), reply.text
        return str(error["message"])


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("templates")
    model = tiny.make_model(folder / "model", model_folder)
    root = folder / "adapters"
    tiny.make_adapter(root / "plain", model, 1)
    with fake_hub() as hub:
        server = serve(
            environment={
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(folder / "hf"),
                "LORADEX_ALLOW_CHAT_TEMPLATE": "true",
                "LORADEX_ALLOW_ADAPTER_ADMIN": "true",
            },
            model_folder=model,
            adapter_root=root,
            cache=folder / "cache",
            adapter_revalidate_seconds=0,
            failed_load_seconds=0,
            template_seconds=0.5,
            log_level="debug",
        )
        yield Place(server, root, hub, model)
        assert "hf_secret" not in server.output()


def prompt_tokens(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens"])


def as_transformers_does(folder: Path, messages: Any) -> list[int]:
    """The prompt of a chat, by the tokenizer files in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def saved_tokenizer(place: Place, folder: Path, **changes: Any) -> None:
    """As training scripts do it: read the base model's, change it, and save it with the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def test_a_chat_is_what_transformers_makes_of_it_with_the_adapters_files(place: Place) -> None:
    saved_tokenizer(place, place.adapter("own"), chat_template=TEMPLATE, eos_token="<|endoftext|>")
    saved_tokenizer(place, place.adapter("copied"))
    one = [{"role": "user", "content": "  Hi, who are you? "}]
    ids = {
        name: place.prompt_ids(name, one[0]["content"]) for name in (None, "plain", "copied", "own")
    }
    assert ids["own"] == as_transformers_does(place.root / "own", one)
    assert ids["copied"] == ids["plain"] == ids[None] == as_transformers_does(place.model, one)
    assert ids["own"] != ids[None]

    expected = as_transformers_does(place.root / "own", MESSAGES)
    assert prompt_tokens(place.chat("own")) == len(expected)


def test_a_template_of_the_request_wins_and_a_completion_has_none(place: Place) -> None:
    place.adapter("won", chat_template_jinja=TEMPLATE)
    asked = place.chat("won", chat_template="{{ messages[1].content }}")
    plain = place.post("completions", "won", prompt=MESSAGES[1]["content"])
    assert prompt_tokens(asked) == prompt_tokens(plain)
    assert prompt_tokens(asked) < prompt_tokens(place.chat("won"))


def test_another_template_on_disk_is_noticed(place: Place) -> None:
    folder = place.adapter("changing")
    plain = prompt_tokens(place.chat("changing"))
    counts = []
    for text in ("one", "one two three", "one two three four five"):
        (folder / "chat_template.jinja").write_text(text)
        counts.append(prompt_tokens(place.chat("changing")))
    assert counts == [1, 3, 5]
    (folder / "chat_template.jinja").unlink()
    assert prompt_tokens(place.chat("changing")) == plain


def test_a_tokenizer_that_disagrees_is_one_sentence_for_every_request(place: Place) -> None:
    folder = place.adapter("grown")
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    for reply in (place.chat("grown"), place.post("completions", "grown", prompt="Hi")):
        sentence = place.refusal(reply)
        assert sentence.startswith("adapter grown: its ")
        assert "'<pad>'" in sentence
        assert sentence.endswith("take its tokenizer files away to have it served with that")
    generated = httpx.post(
        f"{place.server.url}/generate",
        json={"inputs": "Hi", "parameters": {"adapter_id": "grown"}},
        timeout=60,
    )
    assert generated.status_code == 424  # as LoRAX's routes say what an adapter cannot do
    assert "'<pad>'" in generated.json()["error"]
    for path in folder.iterdir():
        if path.name not in FILES:
            path.unlink()
    assert place.chat("grown").status_code == 200


def test_another_vocabulary_is_named_and_another_formatting_is_none(place: Place) -> None:
    file = json.loads((place.model / "tokenizer.json").read_bytes())
    place.adapter("pretty", tokenizer_json=json.dumps(file, indent=2))
    assert place.chat("pretty").status_code == 200
    vocabulary = file["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    place.adapter("swapped", tokenizer_json=json.dumps(file))
    assert "tokenizer.json disagrees: its token '\\u0120of'" in place.refusal(place.chat("swapped"))


def test_a_bad_template_is_a_422_with_its_line_and_others_go_on(place: Place) -> None:
    place.adapter("endless", chat_template_jinja=ENDLESS)
    place.adapter("broken", chat_template_jinja="\n\n{% nonsense %}")
    place.adapter("raising", chat_template_jinja="\n{{ raise_exception('No system, please') }}")
    place.adapter("fine", chat_template_jinja=TEMPLATE)
    with ThreadPoolExecutor(4) as threads:
        endless = [threads.submit(place.chat, "endless") for _ in range(2)]
        for model in ("plain", "", "fine"):
            assert place.chat(model).status_code == 200
        for reply in endless:
            sentence = place.refusal(reply.result(), "template_error")
            assert sentence == "the chat template takes more than 0.5 seconds"
    assert place.refusal(place.chat("broken"), "template_error").endswith("(line 3)")
    assert place.refusal(place.chat("raising"), "template_error") == "No system, please (line 2)"
    completion = place.post("completions", "broken", prompt="Hi")
    assert completion.status_code == 200


def test_a_name_that_an_administrator_gave_means_the_adapters_template_too(place: Place) -> None:
    folder = place.adapter("named", chat_template_jinja="one")
    for text, tokens in (("one", 1), ("one two three", 3)):
        (folder / "chat_template.jinja").write_text(text)
        body = {"lora_name": "alias", "lora_path": "named", "load_inplace": True}
        url = f"{place.server.url}/v1/load_lora_adapter"
        assert httpx.post(url, json=body, timeout=60).status_code == 200
        assert prompt_tokens(place.chat("alias")) == tokens


def test_a_merge_has_the_template_that_all_of_its_parts_have(place: Place) -> None:
    for name, template in (("p1", "one two"), ("p2", "one two"), ("p3", "three")):
        place.adapter(name, chat_template_jinja=template)

    def merged(*ids: str) -> httpx.Response:
        return place.chat("", merged_adapters={"ids": ids, "weights": [1] * len(ids)})

    assert prompt_tokens(merged("p1", "p2")) == 2
    base = prompt_tokens(place.chat(""))
    assert prompt_tokens(merged("p1", "p3")) == base
    assert prompt_tokens(merged("p1", "plain")) == base
    place.adapter("p4", added_tokens_json='{"<pad>": 49152}')
    assert "part p4: its added_tokens.json adds" in place.refusal(merged("p1", "p4"))


def test_one_tenants_template_is_rendered_for_nobody_else(place: Place) -> None:
    files = {name: (place.root / "plain" / name).read_bytes() for name in FILES}
    files["chat_template.jinja"] = b"one two three"
    repository = Repository(files, tokens={"hf_secret", "hf_secret2"})
    place.hub.repositories["acme/private"] = repository
    assert prompt_tokens(place.chat("acme/private", token="hf_secret")) == 3
    assert prompt_tokens(place.chat("acme/private", token="hf_secret2")) == 3
    for token in (None, "hf_other"):
        reply = place.chat("acme/private", token=token)
        assert reply.status_code in (403, 404), reply.text
        assert "one two" not in reply.text
    repository.tokens = {"hf_secret2"}
    assert place.chat("acme/private", token="hf_secret").status_code in (403, 404)
    assert prompt_tokens(place.chat("acme/private", token="hf_secret2")) == 3


def test_the_adapters_end_of_turn_ends_its_replies(place: Place) -> None:
    """A fine-tune whose turns end otherwise than the base model's replies do."""
    plain = place.post("completions", "plain", prompt="Once", max_tokens=30)
    assert plain.json()["choices"][0]["finish_reason"] == "length"
    config = {"eos_token": "<reponame>"}
    place.adapter("ending", tokenizer_config_json=json.dumps(config))
    token_id = json.loads((place.model / "tokenizer.json").read_bytes())["model"]["vocab"][
        "<reponame>"
    ]
    bias = {str(token_id): 100}
    for adapter, reason in (("plain", "length"), ("ending", "stop")):
        reply = place.post(
            "completions", adapter, prompt="Once", max_tokens=30, logit_bias=bias
        ).json()
        assert reply["choices"][0]["finish_reason"] == reason
    assert reply["usage"]["completion_tokens"] == 1


def test_without_the_setting_neither_template_nor_tokenizer_is_looked_at(
    place: Place, serve: Callable[..., Server]
) -> None:
    place.adapter("ignored", chat_template_jinja="one", added_tokens_json='{"<pad>": 49152}')
    server = serve(
        environment={"LORADEX_ADAPTER_CHAT_TEMPLATES": "false"},
        model_folder=place.model,
        adapter_root=place.root,
    )
    other = place._replace(server=server)
    assert prompt_tokens(other.chat("ignored")) == prompt_tokens(other.chat(""))
