"""Whatever clients send, nothing is our error, nothing hangs, nothing grows, nobody else notices.

MUTATED_BODIES=10000 pytest tests/end_to_end/test_hostile_requests.py sends as many.
"""

import json
import os
import random
import typing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from frontend.openapi import OPERATIONS
from pipeline.channels import PROCESSES, Outbox
from pipeline.messages import Message
from tests.end_to_end import tiny
from tests.end_to_end.processes import processes_of
from tests.end_to_end.server import Server, eventually

BODIES = int(os.environ.get("MUTATED_BODIES", "400"))
CLIENTS = 8
SECONDS = 60.0  # for any reply
GROWTH_BYTES = 48 << 20  # of a process, for what its allocators keep
JSON = {"content-type": "application/json"}

CHAT: dict[str, Any] = {
    "model": "good",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 3,
    "temperature": 0.5,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "none",
    "chat_template": "{{ messages[0].content }}",
    "stream": True,
}
LORAX: dict[str, Any] = {
    "inputs": "Hi",
    "parameters": {
        "adapter_id": "good",
        "max_new_tokens": 3,
        "stop": ["x"],
        "top_k": 5,
        "response_format": {"type": "json_object", "schema": {"type": "integer"}},
    },
}
NAMED = {"lora_name": "good", "lora_path": "good"}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "good", "prompt": ["Hi", [5, 6]], "max_tokens": 3, "n": 2},
    "/v1/embeddings": {"model": "good", "input": ["Hi", "you"]},
    "/embed": {"inputs": "Hi"},
    "/pipeline/feature-extraction": {"inputs": ["Hi"]},
    "/tokenize": {"inputs": "Hi", "add_special_tokens": True},
    "/generate": LORAX,
    "/generate_stream": LORAX,
    "/": {**LORAX, "stream": False},
    "/invocations": LORAX,
}
ROUTES = [one.path for one in OPERATIONS if one.body is not None]
WORDS = sorted(
    {name for one in OPERATIONS if one.body for name in one.body.__struct_fields__}
    | {"adapter_id", "adapter_source", "merged_adapters", "ids", "weights", "guided_regex"}
)
DEEP = "[" * 5_000 + "]" * 5_000
RAW = (  # as they stand in JSON
    *("null", "true", "0", "-1", "1e999", "-1e-999", "NaN", "Infinity", "1" * 5_000, "0.1e1", "-0"),
    *('""', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u202e"', '"../../etc/passwd"', "{}"),
    *('"(a+)+$"', '"((a{1,99}){1,99}){1,99}"', '{"$ref": "#"}', '{"type": "array"}', "[[]]", "[]"),
    *('"' + "x" * 20_000 + '"', DEEP, '{"a":' * 500 + "1" + "}" * 500, '"\\n"', "9007199254740993"),
    *("18446744073709551616", "-9223372036854775809", '[{"": []}]', '"{% for a in b %}"', "[null]"),
)
Mutation = Callable[[random.Random, bytes], bytes]


class Verbatim(str):
    """Stands in a body as it is."""


def spoilt(chance: random.Random, body: Any) -> Any:
    """The body with some value in it replaced, added or left out."""
    raw = Verbatim(chance.choice(RAW))
    if isinstance(body, dict) and body:
        key = chance.choice(list(body))
        match chance.randrange(4):
            case 0:
                return {**body, key: spoilt(chance, body[key])}
            case 1:
                return {**body, chance.choice(WORDS): raw}
            case 2:
                return {name: value for name, value in body.items() if name != key}
            case _:
                return {**body, key: raw}
    if isinstance(body, list) and body and chance.random() < 0.7:
        at = chance.randrange(len(body))
        return [*body[:at], spoilt(chance, body[at]), *body[at + 1 :]]
    return raw


def written(body: Any) -> str:
    match body:
        case Verbatim():
            return str(body)
        case dict():
            inside = (f"{json.dumps(name)}: {written(value)}" for name, value in body.items())
            return "{" + ", ".join(inside) + "}"
        case list():
            return "[" + ", ".join(map(written, body)) + "]"
    return json.dumps(body)


def mutated(chance: random.Random, body: dict[str, Any]) -> bytes:
    """Wrong in one to three places, and now and then in its bytes."""
    changed: Any = body
    for _ in range(chance.randint(1, 3)):
        changed = spoilt(chance, changed)
    data = bytearray(written(changed).encode())
    if chance.random() < 0.2:
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = chance.randbytes(4)
            case _:
                data += data[at:]
    return bytes(data)


def bodies(count: int) -> list[tuple[str, bytes]]:
    """The same ones each time: (route, body)."""
    chance = random.Random(0)
    return [
        (route, mutated(chance, VALID.get(route, NAMED)))
        for route in (chance.choice(ROUTES) for _ in range(count))
    ]


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny.make_model(folder / "model", model_folder)
    tiny.make_adapter(folder / "root" / "good", model, 1)
    return serve(
        environment={
            "HF_HUB_OFFLINE": "1",
            "LORADEX_ALLOW_ADAPTER_ADMIN": "true",
            "LORADEX_ALLOW_CHAT_TEMPLATE": "true",
        },
        model_folder=model,
        adapter_root=folder / "root",
        default_adapter_source="local",
        dtype="float32",
        max_body_bytes=100_000,
        max_total_tokens=128,
        max_choices=4,
        template_seconds=0.3,
        request_seconds=10,
    )


class Size(typing.NamedTuple):
    resident_bytes: int
    descriptors: int


def sizes(server: Server) -> dict[int, Size]:
    """Of each process of the server."""
    return {
        process.pid: Size(process.memory_info().rss, process.num_fds())
        for process in processes_of(server)
    }


def pids(server: Server) -> list[int]:
    """Of those that have been started last, which a death changes."""
    return [server.pid(process) for process in PROCESSES]


def is_idle(server: Server) -> bool:
    names = ("loradex_requests_in_flight", "loradex_requests_running")
    return all(server.metric(name) == 0 for name in names)


def statuses(server: Server, some: list[tuple[str, bytes]]) -> Counter[int]:
    """How each of them ended; none as our error."""
    with httpx.Client(base_url=server.url, timeout=SECONDS, headers=JSON) as client:

        def send(one: tuple[str, bytes]) -> int:
            route, body = one
            reply = client.post(route, content=body)
            assert reply.status_code < 500 or reply.status_code == 503, (route, body, reply.text)
            assert '"internal' not in reply.text, (route, body, reply.text)
            return reply.status_code

        with ThreadPoolExecutor(CLIENTS) as threads:
            return Counter(threads.map(send, some))


def test_mutated_bodies_are_answered_and_leave_nothing_behind(server: Server) -> None:
    prompt = ("Once upon a time", "good")
    before = server.token_ids(*prompt, max_new_tokens=20)
    all_of_them = bodies(BODIES)
    warm = max(100, BODIES // 5)
    found = statuses(server, all_of_them[:warm])
    assert eventually(lambda: is_idle(server), 60)
    at_first = sizes(server)
    alive = pids(server)
    found += statuses(server, all_of_them[warm:])
    assert eventually(lambda: is_idle(server), 60)
    print(f"statuses of {BODIES} mutated bodies: {dict(sorted(found.items()))}")
    assert found[200] > BODIES // 20, "hardly any was understood"
    assert found[400] + found[422] > BODIES // 5, "hardly any was wrong"
    at_last = sizes(server)
    assert len(at_last) == len(at_first)
    assert pids(server) == alive, "a process has died"
    lasting = at_first.keys() & at_last.keys()  # one that took too long for a prompt is replaced
    for pid in lasting:
        size = at_last[pid]
        print(f"pid {pid}: {at_first[pid]} -> {size}")
        assert size.resident_bytes < at_first[pid].resident_bytes + GROWTH_BYTES
    assert eventually(
        lambda: all(sizes(server)[pid].descriptors <= at_first[pid].descriptors for pid in lasting)
    )
    assert server.token_ids(*prompt, max_new_tokens=20) == before


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def nested(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"anyOf": [value, {"type": "array", "items": value}]} if levels < 9 else [value]
    return value


NASTY: dict[str, Any] = {
    "regex in itself": chat(guided_regex="((a{1,1000}){1,1000}){1,1000}"),
    "regex of alternatives": chat(guided_regex="(" + "|".join(["a*"] * 2000) + ")*"),
    "regex that backtracks": chat(guided_regex="(a+)+(b+)+(.*.*)*c{1,9999}"),
    "schema that refers to itself": chat(response_format=schema({"$ref": "#"})),
    "schema that refers elsewhere": chat(
        response_format=schema({"$ref": "http://169.254.169.254/latest/meta-data"})
    ),
    "schema that refers to a file": chat(response_format=schema({"$ref": "file:///etc/passwd"})),
    "schema of many choices": chat(response_format=schema({"enum": list(range(9_000))})),
    "schema of many parts": chat(response_format=schema(nested(8))),
    "schema with a pattern": chat(
        response_format=schema({"type": "string", "pattern": "((x{9,99}){9,99}){9,99}"})
    ),
    "template that loops": chat(
        chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}"
    ),
    "template that grows": chat(chat_template="{{ 'x' * 999999999999 }}"),
    "template that looks around": chat(
        chat_template="{{ ().__class__.__base__.__subclasses__() }}"
    ),
    "template that calls itself": chat(
        chat_template="{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
    ),
}


@pytest.mark.parametrize("case", NASTY)
def test_what_would_take_for_ever_is_refused_and_others_go_on(server: Server, case: str) -> None:
    """Where the grammar library follows a grammar all the same, it does so in little time."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.token_ids, "Once upon a time", "good", max_new_tokens=50)
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=NASTY[case], timeout=20)
        assert len(running.result(20)) == 50
    assert reply.status_code in (200, 400, 422), reply.text
    if "template" in case or "elsewhere" in case or "file" in case or "in itself" in case:
        assert reply.status_code in (400, 422)
    assert "root:" not in reply.text


TEXTS = {
    "deep": ("[" * 90_000, 400),
    "a deep value": ('{"model": "", "prompt": ' + "[" * 40_000 + "]" * 40_000 + "}", 400),
    "half of a pair": ('{"model": "", "prompt": "\\ud800"}', 400),
    "half of a pair in a name": ('{"model": "\\udc00", "prompt": "Hi"}', 400),
    "a number beyond all": ('{"model": "", "prompt": "Hi", "seed": ' + "9" * 50_000 + "}", 400),
    "a token beyond all": ('{"model": "", "prompt": [' + "9" * 30 + "]}", 400),
    "a float beyond all": ('{"model": "", "prompt": "Hi", "temperature": 1e999}', 400),
    "no number": ('{"model": "", "prompt": "Hi", "temperature": NaN}', 400),
}


@pytest.mark.parametrize("case", TEXTS)
def test_json_that_is_out_of_all_bounds_is_a_400(server: Server, case: str) -> None:
    text, status = TEXTS[case]
    reply = httpx.post(
        f"{server.url}/v1/completions", content=text.encode(), headers=JSON, timeout=20
    )
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_messages_that_are_none_are_a_line_each_and_kill_no_process(server: Server) -> None:
    alive = pids(server)
    chance = random.Random(1)
    frames = [b"\x92\xa8Shutdown\xa1\xff", b"\x91" * 9_000, *map(chance.randbytes, range(1, 40))]
    inboxes = sorted(path.stem for path in server.run_dir.glob("*.sock"))
    assert len(inboxes) >= 5
    outbox = Outbox(server.run_dir)
    before = server.output().count("event=message_refused")
    for name in inboxes:
        process, _, index = name.partition(".")
        for frame in frames:
            outbox.send(process, typing.cast(Message, msgspec.Raw(frame)), int(index))
    outbox.close()
    refused = len(inboxes) * len(frames)
    assert eventually(lambda: refused <= server.output().count("event=message_refused") - before)
    assert pids(server) == alive
    assert server.token_ids("Hi", "good", max_new_tokens=4)


def test_none_of_it_was_an_error_of_ours(server: Server) -> None:
    """Comes last."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    ours = [
        line for line in page.splitlines() if 'status="500"' in line or 'kind="internal"' in line
    ]
    assert ours == []
    assert "Traceback" not in server.output()
