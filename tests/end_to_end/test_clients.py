"""The published clients of OpenAI and LoRAX, against the whole server."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lorax
import openai
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the id, whatever folder it was loaded from


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.make_model(folder / "model", model_folder)
    for seed in range(12):
        tiny.make_adapter(folder / "root" / f"a{seed}", model, seed)
    return serve(model_folder=model, adapter_root=folder / "root", dtype="float32", rows=16)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str) -> str:
    reply = client.completions.create(
        model=model, prompt="Hello there", max_tokens=12, temperature=0
    )
    return reply.choices[0].text


def test_the_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[0] == BASE
    assert set(ids[1:]) == {f"a{seed}" for seed in range(12)}


def test_a_chat_is_answered_and_accounted_for(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="a1", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=9
    )
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert reply.model == "a1"
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    for model in ("", BASE, "a1"):
        stream = client.completions.create(
            model=model, prompt="Hello there", max_tokens=12, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == ask(client, model)


def test_an_unknown_adapter_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(
            model="nobody", prompt="Hi", extra_body={"adapter_source": "local"}
        )


def test_adapters_differ_and_are_the_same_in_a_crowd_as_alone(client: openai.OpenAI) -> None:
    models = ["", *(f"a{seed}" for seed in range(12))]
    alone = [ask(client, model) for model in models]
    assert len(set(alone)) == len(models)
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda model: ask(client, model), models * 4))
    assert together == alone * 4


def test_loraxs_client_is_served(server: Server) -> None:
    client = lorax.Client(server.url, timeout=60)
    whole = client.generate(
        "Hello there", adapter_id="a1", adapter_source="local", max_new_tokens=8
    )
    assert whole.details is not None
    assert whole.details.generated_tokens == len(whole.details.tokens) <= 8
    pieces = list(
        client.generate_stream(
            "Hello there", adapter_id="a1", adapter_source="local", max_new_tokens=8
        )
    )
    assert pieces[-1].generated_text == whole.generated_text
    assert [piece.token.id for piece in pieces] == [token.id for token in whole.details.tokens]


def test_loraxs_client_is_told_what_is_wrong(server: Server) -> None:
    client = lorax.Client(server.url, timeout=60)
    with pytest.raises(lorax.errors.GenerationError, match="nobody"):
        client.generate("Hello", adapter_id="nobody", adapter_source="local")


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = ask(client, "a2")
    stop = whole[len(whole) // 2 :][:3]
    reply = client.completions.create(
        model="a2", prompt="Hello there", max_tokens=12, temperature=0, stop=stop
    )
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
