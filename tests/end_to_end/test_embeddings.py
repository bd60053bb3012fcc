"""Embeddings through the published clients, against transformers and PEFT.

The server prefills in chunks of 13 tokens, so that the longer texts of these tests have several.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import lorax
import openai
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from tests.end_to_end.oracle import Oracle
from tests.end_to_end.server import Server, eventually

STORY = "Once upon a time, in a small village at the foot of a mountain, there lived a woman who"
TEXTS = ["The sea.", STORY, "\u6d77 \U0001f30a", "x"]
ADAPTERS = [None, "all_linear", "rslora_patterns"]
CLOSE = 1e-4  # both sides are fp32, and add up in another order
CONTEXT = 200


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], adapter_root: Path) -> Server:
    return serve(
        adapter_root=adapter_root,
        dtype="float32",
        prefill_chunk_tokens=13,
        rows=16,
        max_total_tokens=CONTEXT,
    )


def ids_of(oracle: Oracle, text: str) -> list[int]:
    ids: list[int] = oracle.tokenizer(text).input_ids
    return ids


def expected(
    oracle: Oracle, text: str, adapter: str | None = None, pooling: str = "last"
) -> Tensor:
    states = oracle.states(ids_of(oracle, text), adapter)
    return F.normalize(states[-1] if pooling == "last" else states.mean(0), dim=-1)


def check(given: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(given), wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_they_are_transformers(
    client: openai.OpenAI, oracle: Oracle, adapter: str | None, pooling: str
) -> None:
    """OpenAI's client asks for base64 and gives numbers."""
    reply = client.embeddings.create(
        model=adapter or "", input=TEXTS, extra_body={"pooling": pooling}
    )
    assert [one.index for one in reply.data] == list(range(len(TEXTS)))
    for one, text in zip(reply.data, TEXTS, strict=True):
        check(one.embedding, expected(oracle, text, adapter, pooling))
    tokens = sum(len(ids_of(oracle, text)) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (tokens, tokens)
    assert reply.model == adapter or not adapter


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_token_ids_are_embedded_as_their_text(
    client: openai.OpenAI, oracle: Oracle, encoding: Any
) -> None:
    ids = [ids_of(oracle, text) for text in TEXTS]
    for given in (ids, ids[1]):
        reply = client.embeddings.create(model="", input=given, encoding_format=encoding)
        wanted = TEXTS if given is ids else TEXTS[1:2]
        if encoding == "float":
            for one, text in zip(reply.data, wanted, strict=True):
                check(one.embedding, expected(oracle, text))
        else:
            assert all(isinstance(one.embedding, str) for one in reply.data)


def test_what_is_not_normalized_keeps_its_length(client: openai.OpenAI, oracle: Oracle) -> None:
    reply = client.embeddings.create(
        model="", input=STORY, extra_body={"normalize": False, "pooling": "mean"}
    )
    states = oracle.states(ids_of(oracle, STORY))
    given = torch.tensor(reply.data[0].embedding)
    torch.testing.assert_close(given, states.mean(0), rtol=1e-3, atol=1e-3)
    assert float(given.norm()) != pytest.approx(1, abs=0.1)


def test_a_hundred_inputs_come_back_in_order_and_disturb_nobody(
    server: Server, client: openai.OpenAI, oracle: Oracle
) -> None:
    """They are more than run at once, and share steps with a reply of the same prompt."""
    alone = server.token_ids(STORY, "all_linear", max_new_tokens=40)
    texts = [f"{number}. {STORY[:number]}" for number in range(100)]
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(server.token_ids, STORY, "all_linear", max_new_tokens=40)
        reply = client.embeddings.create(model="qv", input=texts, extra_body={"pooling": "mean"})
        assert beside.result() == alone
    assert len(reply.data) == len(texts)
    for at in (0, 1, 50, 99):
        check(reply.data[at].embedding, expected(oracle, texts[at], "qv", "mean"))


def test_a_last_state_uses_the_prefix_cache_and_a_mean_does_not(
    server: Server, client: openai.OpenAI, oracle: Oracle
) -> None:
    text = STORY + " had a cat"
    client.embeddings.create(model="patterns", input=text)
    hits = server.metric("loradex_prefix_cache_hit_tokens_total")
    for pooling in ("mean", "last"):
        reply = client.embeddings.create(
            model="patterns", input=text, extra_body={"pooling": pooling}
        )
        check(reply.data[0].embedding, expected(oracle, text, "patterns", pooling))
    assert eventually(lambda: server.metric("loradex_prefix_cache_hit_tokens_total") == hits + 16)


def test_the_input_that_is_too_long_is_named(client: openai.OpenAI, oracle: Oracle) -> None:
    fits = [5] * (CONTEXT - 1)
    reply = client.embeddings.create(model="", input=[fits])
    assert reply.usage.prompt_tokens == CONTEXT - 1
    with pytest.raises(openai.BadRequestError, match=r"`input\[2\]`.*less than 200") as refused:
        client.embeddings.create(model="", input=[[5], [6], [*fits, 5], [7]])
    assert refused.value.param == "input[2]"
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        client.embeddings.create(model="", input=[[5], [10**6]])
    with pytest.raises(openai.BadRequestError, match="`dimensions` must be 576"):
        client.embeddings.create(model="", input="a", dimensions=64)
    assert len(client.embeddings.create(model="", input="a", dimensions=576).data) == 1


def test_an_adapter_that_is_not_there_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(
            model="no-such", input=["a", "b"], extra_body={"adapter_source": "local"}
        )


def test_they_are_awaited_too(server: Server, oracle: Oracle) -> None:
    async def ask() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x") as client:
            replies = await asyncio.gather(
                *(client.embeddings.create(model="", input=text) for text in TEXTS)
            )
        return [reply.data[0].embedding for reply in replies]

    for given, text in zip(asyncio.run(ask()), TEXTS, strict=True):
        check(given, expected(oracle, text))


def test_loraxs_client_embeds(server: Server, oracle: Oracle) -> None:
    check(lorax.Client(server.url).embed(STORY).embeddings, expected(oracle, STORY))
    body = {"inputs": STORY, "parameters": {"adapter_id": "qv", "adapter_source": "local"}}
    reply = httpx.post(f"{server.url}/embed", json=body, timeout=60).json()
    check(reply["embeddings"], expected(oracle, STORY, "qv"))


def test_hugging_faces_client_extracts_features(server: Server, oracle: Oracle) -> None:
    client = InferenceClient(f"{server.url}/pipeline/feature-extraction")
    given = client.feature_extraction(TEXTS)
    assert given.shape == (len(TEXTS), 576)
    for one, text in zip(given, TEXTS, strict=True):
        check(one, expected(oracle, text))
    assert client.feature_extraction(STORY, normalize=True).shape == (1, 576)
    with pytest.raises(HfHubHTTPError):
        client.feature_extraction(STORY, prompt_name="query")


def test_they_are_counted(server: Server, client: openai.OpenAI) -> None:
    def counted() -> float:
        return server.metric("loradex_embeddings_total")

    before, generated = counted(), server.metric("loradex_request_generated_tokens_count")
    client.embeddings.create(model="", input=TEXTS)
    assert eventually(lambda: counted() == before + len(TEXTS))
    assert server.metric("loradex_request_generated_tokens_count") == generated
