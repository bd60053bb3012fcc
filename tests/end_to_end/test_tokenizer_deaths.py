"""Tokenizer workers are killed while replies of all kinds run: each is what it is without that."""

import asyncio
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually

WORKERS = 2
KILLS = 8
SEEDS = range(4)
UNLIKE = {"id", "created", "queue_time", "total_time", "inference_time", "time_per_token"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a", "b"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["one", "another", "a third"]},
        "numbers": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 3, "maxItems": 9},
    },
    "required": ["kind", "numbers"],
}
CHAT = [{"role": "user", "content": "Tell me a story"}]


def requests(seed: int) -> list[tuple[str, dict[str, Any]]]:
    """One of each kind: the path, and the body. A seed of 0 is greedy."""
    adapter = f"adapter-{seed % 2}"
    sampled: dict[str, Any] = {"temperature": 0.0} if seed == 0 else {"temperature": 0.7}
    openai = {"model": adapter, "max_tokens": 80, "seed": seed, **sampled}
    parameters: dict[str, Any] = {
        "adapter_id": adapter,
        "adapter_source": "local",
        "max_new_tokens": 80,
        "seed": seed,
        "details": True,
        "stop": ["qu", "zz"],
    }
    if seed:
        parameters |= {"do_sample": True, "temperature": 0.7}
    lorax = {"inputs": f"Once upon a time {seed}", "parameters": parameters}
    whole = {"parameters": parameters | {"decoder_input_details": True, "stop": []}}
    chat = {"messages": CHAT, **openai}
    named = {"tools": [TOOL], "tool_choice": "required"}
    text = {"prompt": f"Once upon a {seed}", **openai}
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
    own = {"chat_template": "{% for one in messages %}{{ one.content }}!{% endfor %}"}
    return [
        ("/generate_stream", lorax),
        ("/generate", lorax | whole),
        ("/v1/chat/completions", chat | {"stream": True, "n": 3, "stop": ["qu", " the"]}),
        ("/v1/chat/completions", chat | {"stream": True, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", chat | {"stream": True, **named}),
        ("/v1/chat/completions", chat | {"n": 2, **named}),
        ("/v1/chat/completions", chat | {"stream": True, "response_format": form}),
        ("/v1/chat/completions", chat | {"stream": True, **own}),
        ("/v1/completions", text | {"echo": True, "logprobs": 1}),
        ("/v1/completions", text | {"stream": True, "stream_options": {"include_usage": True}}),
    ]


def lasting(reply: Any) -> Any:
    """What of it does not depend on when it came, nor on the last bits of numbers."""
    if isinstance(reply, dict):
        return {name: lasting(value) for name, value in reply.items() if name not in UNLIKE}
    if isinstance(reply, list):
        return [lasting(one) for one in reply]
    return round(reply, 2) if isinstance(reply, float) else reply


def joined(events: list[dict[str, Any]]) -> Any:
    """A stream of events as one reply, wherever it was cut."""
    if "token" in events[0]:
        return lasting(events)
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            whole = choices.setdefault(part["index"], {"text": "", "calls": {}, "logprobs": []})
            delta = part.get("delta", part)
            whole["text"] += delta.get("content") or delta.get("text") or ""
            for call in delta.get("tool_calls") or ():
                name, arguments = whole["calls"].get(call["index"], ("", ""))
                function = call["function"]
                name += function.get("name") or ""
                whole["calls"][call["index"]] = (name, arguments + function.get("arguments", ""))
            whole["logprobs"] += (part.get("logprobs") or {}).get("content") or []
            whole["end"] = part.get("finish_reason") or whole.get("end")
    return lasting({"choices": [choices[index] for index in sorted(choices)], "usage": usage})


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    if path != "/generate_stream" and not body.get("stream"):
        reply = await client.post(path, json=body)
        assert reply.status_code == 200, (reply.text, body)
        found = reply.json()
        for choice in found.get("choices", ()) if isinstance(found, dict) else ():
            for call in choice.get("message", {}).get("tool_calls") or ():
                del call["id"]
        return lasting(found)
    async with client.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200, (await stream.aread(), body)
        lines = [line async for line in stream.aiter_lines() if line.startswith("data:")]
    datas = [line.removeprefix("data:").strip() for line in lines]
    events = [json.loads(data) for data in datas if data != "[DONE]"]
    assert not any("error" in event for event in events), events[-1]
    return joined(events)


async def ask_all(url: str, asked: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await asyncio.gather(*(ask(client, path, body) for path, body in asked))


def replaced(server: Server, index: int) -> bool:
    """Kill a worker; whether another takes its place."""
    pid = server.pid("tokenizer_workers", index)
    server.signal("tokenizer_workers", signal.SIGKILL, index)
    return eventually(lambda: server.pid("tokenizer_workers", index) != pid, 30)


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("deaths")
    model = tiny.make_model(folder / "model", model_folder)
    for seed in range(2):
        tiny.make_adapter(folder / "root" / f"adapter-{seed}", model, seed, std=0.01)
    server = serve(
        environment={"LORADEX_ALLOW_CHAT_TEMPLATE": "true"},
        model_folder=model,
        adapter_root=folder / "root",
        dtype="float32",
        tokenizer_workers=WORKERS,
        restart_limit=100,
        restart_backoff_seconds=0,
        stats_seconds=0.2,
    )
    yield server
    server.stop()
    assert set(server.exit_codes().values()) == {0}
    assert server.leftovers() == []


def test_replies_of_all_kinds_are_the_same(server: Server) -> None:
    """Except where two tokens are as likely as each other to the last bits of their logits, which
    depend on who else is in the batch: there are runs without deaths to tell these by."""
    everything = [one for seed in SEEDS for one in requests(seed)]
    first, *others = (asyncio.run(ask_all(server.url, everything)) for _ in range(3))
    steady = [at for at, one in enumerate(first) if all(one == other[at] for other in others)]
    assert len(steady) > 0.8 * len(everything)
    assert {everything[at][0] for at in steady} == {path for path, _ in everything}
    moments = random.Random(5)
    state = {"stopping": False}
    replies = 0

    async def repeat(client: httpx.AsyncClient, at: int) -> None:
        nonlocal replies
        while not state["stopping"]:
            assert await ask(client, *everything[at]) == first[at], everything[at]
            replies += 1

    async def kill() -> None:
        for _ in range(KILLS):
            index = moments.randrange(WORKERS)
            await asyncio.sleep(moments.uniform(0, 1.0))  # the moment is what is varied
            assert await asyncio.to_thread(replaced, server, index)
        state["stopping"] = True

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            await asyncio.gather(kill(), *(repeat(client, at) for at in steady))

    asyncio.run(run())
    assert replies >= len(steady)
    assert server.output().count("event=died") == KILLS
    assert server.metric("loradex_repeated_requests_total") > 0
    assert eventually(lambda: server.metric("loradex_replies_kept") == 0)
