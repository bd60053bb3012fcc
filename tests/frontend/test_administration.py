"""The routes that administer adapters, with a scheduler that is this test."""

import asyncio
from typing import Any

import httpx
import pytest

from frontend.adapters import scope_of
from pipeline.errors import RequestError
from pipeline.messages import (
    AdapterDescription,
    AdapterKey,
    AdapterList,
    AdminCommand,
    AdminDone,
    AdminVerb,
    Aliases,
    AliasesTaken,
    Failure,
    FailureKind,
    ListAdapters,
    Message,
    Tier,
)
from tests.frontend.fakes import Backend, says

pytestmark = pytest.mark.anyio

KEY = "not-for-everybody"
ADMIN = {"Authorization": f"Bearer {KEY}"}
SQL = AdapterKey("hub", "org/sql")
MISSING = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "adapter org/sql: no such repository")
ROUTES = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/v1/adapters/pin",
    "/v1/adapters/unpin",
)
LOAD = {"lora_name": "sql", "lora_path": "org/sql"}


class Scheduled(Backend):
    """A backend whose scheduler answers commands: with this failure, or as done."""

    def __init__(self, failure: Failure | None = None, **changes: Any) -> None:
        self.failure = failure
        self.listed: tuple[AdapterDescription, ...] = ()
        super().__init__(says("Hi"), **{"allow_adapter_admin": True, **changes})

    def send(self, process: str, message: Message, index: int) -> None:
        super().send(process, message, index)
        if isinstance(message, AdminCommand):
            self.answer_soon(AdminDone(message.command_id, self.failure))
        elif isinstance(message, ListAdapters):
            self.answer_soon(AdapterList(message.command_id, self.listed))

    def answer_soon(self, message: AdminDone | AdapterList) -> None:
        asyncio.get_running_loop().call_soon(self.commands.answer, message)

    def command(self) -> AdminCommand:
        (command,) = [one for _, one, _ in self.sent if isinstance(one, AdminCommand)]
        return command


async def test_vllms_load_names_an_adapter_and_answers_in_its_words() -> None:
    backend = Scheduled()
    reply = await backend.post("/v1/load_lora_adapter", LOAD)
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'sql' added successfully.",
    )
    command = backend.command()
    assert (command.verb, command.name, command.adapter) == (AdminVerb.LOAD, "sql", SQL)
    assert not command.in_place
    assert not command.pinned


async def test_vllms_load_in_place_is_one() -> None:
    backend = Scheduled()
    await backend.post("/v1/load_lora_adapter", {**LOAD, "load_inplace": True})
    assert backend.command().in_place


async def test_vllms_unload_answers_in_its_words_and_ignores_the_number() -> None:
    backend = Scheduled()
    reply = await backend.post("/v1/unload_lora_adapter", {"lora_name": "sql", "lora_int_id": 3})
    assert reply.text == "Success: LoRA adapter 'sql' removed successfully."
    assert (backend.command().verb, backend.command().name) == (AdminVerb.UNLOAD, "sql")


async def test_vllms_errors_have_openais_shape_and_the_status_as_their_code() -> None:
    reply = await Scheduled(MISSING).post("/v1/load_lora_adapter", LOAD)
    assert reply.status_code == 404
    assert reply.json()["error"] == {
        "message": MISSING.message,
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


TAKEN = Failure(400, FailureKind.NAME_TAKEN, "an adapter is loaded as 'sql' already")
UNKNOWN = Failure(404, FailureKind.NAME_UNKNOWN, "no adapter is loaded as 'sql'")
INVALID = Failure(422, FailureKind.ADAPTER_INVALID, "adapter org/sql: it does not fit")
BROKEN = Failure(500, FailureKind.INTERNAL, "adapter org/sql: loading it failed")
AWAY = Failure(503, FailureKind.ADAPTER_UNAVAILABLE, "adapter org/sql: the hub stalls")


@pytest.mark.parametrize(
    ("failure", "route", "status", "type", "message"),
    [
        (
            TAKEN,
            "load",
            400,
            "InvalidUserInput",
            "The lora adapter 'sql' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True.",
        ),
        (UNKNOWN, "unload", 404, "NotFoundError", "The lora adapter 'sql' cannot be found."),
        (INVALID, "load", 400, "BadRequestError", INVALID.message),
        (BROKEN, "load", 500, "InternalServerError", BROKEN.message),
        (AWAY, "load", 503, "ServiceUnavailableError", AWAY.message),
    ],
)
async def test_vllms_errors_are_in_the_words_that_controllers_look_for(
    failure: Failure, route: str, status: int, type: str, message: str
) -> None:
    reply = await Scheduled(failure).post(f"/v1/{route}_lora_adapter", LOAD)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["message"]) == (type, status, message)


async def test_vllm_names_what_is_missing() -> None:
    for route, sentence in (
        ("load", "Both 'lora_name' and 'lora_path' must be provided."),
        ("unload", "'lora_name' needs to be provided to unload a LoRA adapter."),
    ):
        error = (await Scheduled().post(f"/v1/{route}_lora_adapter", {})).json()["error"]
        assert (error["type"], error["message"]) == ("InvalidUserInput", sentence)


@pytest.mark.parametrize(
    ("failure", "route", "status", "message"),
    [
        (TAKEN, "load", 400, "Failed to load LoRA adapter sql because it is already loaded"),
        (UNKNOWN, "unload", 400, "LoRA with name sql does not exist. Loaded LoRAs: other"),
        (INVALID, "load", 400, INVALID.message),
        (AWAY, "load", 503, AWAY.message),
    ],
)
async def test_sglangs_errors_are_in_its_words(
    failure: Failure, route: str, status: int, message: str
) -> None:
    backend = Scheduled(failure)
    backend.downstream.aliases.replace(Aliases(1, {"other": SQL}))
    reply = await backend.post(f"/{route}_lora_adapter", LOAD)
    assert reply.status_code == status
    assert reply.json() == {
        "success": False,
        "error_message": message,
        "loaded_adapters": {"other": "org/sql"},
    }


async def test_a_name_in_braces_is_only_a_name() -> None:
    load = {**LOAD, "lora_name": "{name.__class__}"}
    error = (await Scheduled(TAKEN).post("/v1/load_lora_adapter", load)).json()["error"]
    assert error["message"].startswith("The lora adapter '{name.__class__}' has already")


async def test_sglangs_load_and_unload_answer_with_what_is_loaded() -> None:
    backend = Scheduled()
    backend.downstream.aliases.replace(Aliases(1, {"sql": SQL}))
    reply = await backend.post("/load_lora_adapter", {**LOAD, "pinned": True})
    assert reply.status_code == 200
    assert reply.json() == {
        "success": True,
        "error_message": "",
        "loaded_adapters": {"sql": "org/sql"},
    }
    assert backend.command().pinned
    backend = Scheduled()
    reply = await backend.post("/unload_lora_adapter", {"lora_name": "sql"})
    assert reply.json() == {"success": True, "error_message": "", "loaded_adapters": {}}


async def test_sglangs_errors_are_400_with_the_sentence() -> None:
    reply = await Scheduled(MISSING).post("/load_lora_adapter", LOAD)
    assert reply.status_code == 400
    assert reply.json() == {
        "success": False,
        "error_message": MISSING.message,
        "loaded_adapters": {},
    }


@pytest.mark.parametrize("verb", [AdminVerb.PIN, AdminVerb.UNPIN])
async def test_an_adapter_is_pinned_and_unpinned_by_its_id_or_its_name(verb: AdminVerb) -> None:
    for name in ("org/sql", "sql"):
        backend = Scheduled()
        backend.downstream.aliases.replace(Aliases(1, {"sql": SQL}))
        reply = await backend.post(f"/v1/adapters/{verb.value}", {"id": name})
        assert reply.status_code == 200
        assert (backend.command().verb, backend.command().adapter) == (verb, SQL)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "x"}),
        ("/v1/load_lora_adapter", {"lora_path": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "some/base"}),
        ("/v1/load_lora_adapter", {"lora_name": "some/base", "lora_path": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\nb"}),
        ("/v1/load_lora_adapter", {"lora_name": 3}),
        ("/v1/unload_lora_adapter", {}),
        ("/load_lora_adapter", {"lora_name": "x"}),
        ("/unload_lora_adapter", {}),
        ("/v1/adapters/pin", {}),
        ("/v1/adapters/pin", {"id": ""}),
        ("/v1/adapters/unpin", {"id": "some/base"}),
    ],
)
async def test_what_makes_no_sense_is_refused_and_goes_nowhere(path: str, body: Any) -> None:
    backend = Scheduled()
    reply = await backend.post(path, body)
    assert reply.status_code == 400
    assert backend.sent == []


@pytest.mark.parametrize("route", ROUTES)
async def test_without_permission_nothing_is_administered(route: str) -> None:
    backend = Scheduled(allow_adapter_admin=False)
    reply = await backend.post(route, {**LOAD, "id": "x"})
    assert reply.status_code == 403
    assert "allow_adapter_admin" in reply.text
    assert backend.sent == []


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("given", ["", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "é"])
async def test_where_a_key_is_set_it_must_be_shown(route: str, given: str) -> None:
    backend = Scheduled(admin_api_key=KEY)
    headers = {b"Authorization": given.encode("latin-1")}
    async with backend.client() as client:
        reply = await client.post(route, json={**LOAD, "id": "x"}, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert KEY not in reply.text
    assert backend.sent == []
    accepted = await backend.post(route, {**LOAD, "id": "x"}, headers=ADMIN)
    assert accepted.status_code == 200


async def test_the_key_goes_to_no_source_but_the_token_of_the_body_does() -> None:
    backend = Scheduled(admin_api_key=KEY)
    await backend.post("/v1/load_lora_adapter", LOAD, headers=ADMIN)
    assert backend.command().adapter_token is None
    assert backend.command().adapter == SQL
    backend = Scheduled(admin_api_key=KEY)
    shown = {**ADMIN, "X-Adapter-Token": "hf_header"}
    await backend.post("/v1/load_lora_adapter", LOAD, headers=shown)
    assert backend.command().adapter_token == "hf_header"
    backend = Scheduled(admin_api_key=KEY)
    await backend.post("/v1/load_lora_adapter", {**LOAD, "api_token": "hf_mine"}, headers=shown)
    assert backend.command().adapter_token == "hf_mine"
    assert backend.command().adapter == AdapterKey("hub", "org/sql", scope=scope_of("hf_mine"))


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/load_lora_adapter"])
async def test_bodies_that_are_none_are_told_in_the_familys_shape(route: str) -> None:
    def sentence(reply: httpx.Response) -> str:
        body = reply.json()
        return str(body["error"]["message"] if "error" in body else body["error_message"])

    backend = Scheduled(max_body_bytes=50)
    async with backend.client() as client:
        plain = await client.post(route, content=b"{}")
        broken = await client.post(
            route, content=b"{", headers={"Content-Type": "application/json"}
        )
        large = await client.post(route, json={"lora_name": "x" * 50})
    assert "Content-Type" in sentence(plain)
    assert "not JSON" in sentence(broken)
    assert "larger than 50 bytes" in sentence(large)
    starting = await Backend(ready=False, allow_adapter_admin=True).post(route, LOAD)
    assert starting.status_code == 503
    assert "not ready" in sentence(starting)


async def test_a_name_means_what_was_loaded_seen_with_the_requests_own_token() -> None:
    backend = Scheduled()
    loaded = AdapterKey("hub", "org/sql", scope=scope_of("hf_admins"))
    backend.downstream.aliases.replace(Aliases(1, {"sql": loaded}))
    for headers, scope in (({}, ""), ({"Authorization": "Bearer hf_mine"}, scope_of("hf_mine"))):
        body = {"model": "sql", "prompt": "Hi"}
        assert (await backend.post("/v1/completions", body, headers=headers)).status_code == 200
        assert backend.prompts()[-1].adapter == AdapterKey("hub", "org/sql", scope=scope)
    generate = {"inputs": "Hi", "parameters": {"adapter_id": "sql"}}
    await backend.post("/generate", generate)
    assert backend.prompts()[-1].adapter == SQL
    await backend.post("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "sql-2"}})
    assert backend.prompts()[-1].adapter == AdapterKey("hub", "sql-2")


async def test_a_name_that_is_gone_is_confirmed_when_its_requests_have_ended() -> None:
    backend = Scheduled(index=3)
    aliases = backend.downstream.aliases
    aliases.replace(Aliases(1, {"sql": SQL}))
    prompt_of = backend.answer

    def take_the_name_away(prompt: Any) -> Any:
        aliases.replace(Aliases(2, {}))
        assert confirmed() == [AliasesTaken(1, 3)]
        return prompt_of(prompt)

    def confirmed() -> list[Message]:
        return [message for _, message, _ in backend.sent if isinstance(message, AliasesTaken)]

    backend.answer = take_the_name_away
    await backend.post("/v1/completions", {"model": "sql", "prompt": "Hi"})
    assert confirmed() == [AliasesTaken(1, 3), AliasesTaken(2, 3)]


async def test_names_are_among_the_models_private_ones_for_their_tenant() -> None:
    backend = Scheduled()
    private = AdapterKey("hub", "org/private", scope=scope_of("hf_mine"))
    backend.downstream.aliases.replace(Aliases(1, {"sql": SQL, "mine": private}))
    base, sql = (await backend.get("/v1/models")).json()["data"]
    assert (sql["id"], sql["root"], sql["parent"]) == ("sql", "org/sql", base["id"])
    mine = await backend.get("/v1/models", headers={"Authorization": "Bearer hf_mine"})
    assert [model["id"] for model in mine.json()["data"]] == ["some/base", "sql", "mine"]


def described(key: AdapterKey, tier: Tier = Tier.DEVICE) -> AdapterDescription:
    return AdapterDescription(key, tier, 4096, 16, True, 2, 1, 3, 5, 1.23456)


async def test_the_list_has_every_adapter_with_its_figures_and_names() -> None:
    backend = Scheduled(allow_adapter_admin=False)
    backend.downstream.aliases.replace(Aliases(1, {"sql": SQL}))
    backend.listed = (described(SQL), described(AdapterKey("hub", "org/b", "v1"), Tier.HOST))
    listed = (await backend.get("/v1/adapters")).json()
    assert listed["object"] == "list"
    assert listed["data"][0] == {
        "source": "hub",
        "id": "org/sql",
        "revision": None,
        "private": False,
        "names": ["sql"],
        "rank": 16,
        "bytes": 4096,
        "tier": "device",
        "pinned": True,
        "pins": 2,
        "running": 1,
        "waiting": 3,
        "loads": 5,
        "idle_seconds": 1.235,
    }
    assert (listed["data"][1]["revision"], listed["data"][1]["tier"]) == ("v1", "host")


@pytest.mark.parametrize(
    ("changes", "headers", "shown"),
    [
        ({"allow_adapter_admin": False}, {}, 1),
        ({"allow_adapter_admin": False, "admin_api_key": KEY}, ADMIN, 1),
        ({"admin_api_key": KEY}, {}, 1),
        ({"admin_api_key": KEY}, ADMIN, 2),
        ({}, {}, 2),
    ],
)
async def test_private_adapters_are_listed_for_administrators(
    changes: dict[str, Any], headers: dict[str, str], shown: int
) -> None:
    backend = Scheduled(**changes)
    scope = scope_of("hf_mine")
    backend.listed = (described(SQL), described(AdapterKey("hub", "org/x", scope=scope)))
    reply = await backend.get("/v1/adapters", headers=headers)
    assert len(reply.json()["data"]) == shown
    assert scope not in reply.text


async def test_what_is_to_be_preloaded_is_pinned_and_failures_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Scheduled(allow_adapter_admin=False, preload_adapter=("org/sql",))
    with caplog.at_level("INFO"):
        await backend.administration.preload()
    assert (backend.command().verb, backend.command().adapter) == (AdminVerb.PIN, SQL)
    failing = Scheduled(MISSING, preload_adapter=("org/sql", "a\nb"))
    await failing.administration.preload()
    assert "event=preloaded adapter='org/sql'" in caplog.text
    assert caplog.text.count("event=preload_failed") == 2


async def test_an_answer_that_nobody_waits_for_is_ignored() -> None:
    backend = Scheduled()
    backend.commands.answer(AdminDone(5))
    assert (await backend.post("/v1/load_lora_adapter", LOAD)).status_code == 200


async def test_a_command_that_a_dead_scheduler_was_given_fails() -> None:
    backend = Scheduled()
    asked = asyncio.create_task(backend.commands.do(AdminCommand(0, 0, AdminVerb.UNLOAD, "x")))
    await asyncio.sleep(0)  # until it is sent
    backend.commands.scheduler_started()
    with pytest.raises(RequestError, match="The scheduler died before this was done") as failed:
        await asked
    assert failed.value.status == 503
