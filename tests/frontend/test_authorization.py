"""Server keys, adapter tokens, and what of them goes where."""

from typing import Any

import pytest

from frontend.adapters import scope_of
from frontend.authorization import Authorization, ServerKeys
from pipeline.messages import AdapterKey
from tests.frontend.fakes import Backend, says, settings

pytestmark = pytest.mark.anyio

KEY, OTHER_KEY, ADMIN = "key-of-this-server", "another", "of-the-administrator"
CHAT = "/v1/chat/completions"
BODY = {"model": "org/x", "messages": [{"role": "user", "content": "Hi"}]}
LORAX = {"inputs": "Hi", "parameters": {"adapter_id": "org/x"}}


def shows(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def read(headers: dict[str, str], **changes: Any) -> Authorization:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return ServerKeys(settings(**changes)).read({"headers": raw})


@pytest.mark.parametrize(
    "given",
    [{}, shows("wrong"), shows(KEY + "x"), shows(""), {"Authorization": KEY}, {"X-Api-Key": KEY}],
)
async def test_without_a_key_nothing_is_asked_of_anybody(given: dict[str, str]) -> None:
    backend = Backend(says("Hello"), api_key=(KEY, OTHER_KEY))
    openai = await backend.post(CHAT, BODY, headers=given)
    lorax = await backend.post("/", LORAX, headers=given)
    assert openai.status_code == lorax.status_code == 401
    assert openai.headers["www-authenticate"] == "Bearer"
    assert openai.json()["error"]["code"] == "invalid_api_key"
    assert lorax.json()["error_type"] == "unauthorized"
    assert KEY not in openai.text + lorax.text
    for path in ("/info", "/v1/models", "/v1/adapters", "/nowhere"):
        assert (await backend.get(path, headers=given)).status_code == 401, path
    assert backend.sent == []


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
async def test_any_of_the_keys_opens_the_routes(key: str) -> None:
    backend = Backend(says("Hello"), api_key=(KEY, OTHER_KEY))
    assert (await backend.post(CHAT, BODY, headers=shows(key))).status_code == 200
    assert (await backend.post("/generate", LORAX, headers=shows(key))).status_code == 200
    assert (await backend.get("/v1/models", headers=shows(key))).status_code == 200


async def test_machines_that_look_after_the_server_need_no_key() -> None:
    backend = Backend(api_key=(KEY,))
    for path in ("/", "/health", "/metrics"):
        assert (await backend.get(path)).status_code == 200, path
    for path in ("/health/", "/Health"):
        assert (await backend.get(path)).status_code == 401, path
    assert (await backend.post("/health", {})).status_code == 401


async def test_metrics_may_be_protected_too() -> None:
    backend = Backend(api_key=(KEY,), protect_metrics=True)
    assert (await backend.get("/metrics")).status_code == 401
    assert (await backend.get("/metrics", headers=shows(KEY))).status_code == 200
    assert (await backend.get("/health")).status_code == 200


async def test_a_key_is_for_this_server_alone_and_a_token_for_the_adapters_source() -> None:
    backend = Backend(says("Hello"), api_key=(KEY,))
    await backend.post(CHAT, BODY, headers=shows(KEY))
    await backend.post(CHAT, BODY, headers={**shows(KEY), "X-Adapter-Token": "hf_mine"})
    await backend.post(CHAT, {**BODY, "api_token": "hf_body"}, headers=shows(KEY))
    assert [prompt.adapter_token for prompt in backend.prompts()] == [None, "hf_mine", "hf_body"]
    assert [prompt.adapter for prompt in backend.prompts()] == [
        AdapterKey("hub", "org/x", scope=scope_of(token)) for token in (None, "hf_mine", "hf_body")
    ]
    assert {prompt.tenant for prompt in backend.prompts()} == {scope_of(KEY)}


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, None),
        (shows("hf_mine"), "hf_mine"),
        ({"Authorization": "bearer   hf_mine "}, "hf_mine"),
        ({"Authorization": "Basic dXNlcg=="}, None),
        (shows(""), None),
        *((shows(name), None) for name in ("EMPTY", "dummy", "-", "sk-no-key-required", "None")),
        (shows("sk-proj-of-somebody-else"), None),
        ({**shows("hf_theirs"), "X-Adapter-Token": "hf_mine"}, "hf_mine"),
        ({**shows("hf_mine"), "X-Adapter-Token": "EMPTY"}, "hf_mine"),
        (shows(ADMIN), None),
    ],
)
def test_where_no_key_is_set_a_bearer_is_the_adapters_token_unless_it_is_something_else(
    headers: dict[str, str], token: str | None
) -> None:
    shown = read(headers, allow_adapter_admin=True, admin_api_key=ADMIN)
    assert shown.adapter_token == token
    assert "hf_" not in repr(shown)


async def test_an_administrator_may_do_what_others_may_and_not_the_other_way_round() -> None:
    backend = Backend(says("Hello"), api_key=(KEY,), admin_api_key=ADMIN, allow_adapter_admin=True)
    assert (await backend.post(CHAT, BODY, headers=shows(ADMIN))).status_code == 200
    load = {"lora_name": "sql", "lora_path": "org/sql"}
    for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        assert (await backend.post(route, load, headers=shows(KEY))).status_code == 401


async def test_an_administrators_key_opens_nothing_where_nobody_administers() -> None:
    backend = Backend(says("Hello"), api_key=(KEY,), admin_api_key=ADMIN)
    assert (await backend.post(CHAT, BODY, headers=shows(ADMIN))).status_code == 401


def test_where_administrators_have_no_key_a_servers_key_will_do() -> None:
    keys = ServerKeys(settings(api_key=(KEY,), allow_adapter_admin=True))
    shown = {"headers": [(b"authorization", f"Bearer {KEY}".encode())]}
    assert keys.is_administrator(shown)
    assert keys.admit(shown)
    assert not keys.admit({"headers": []})
