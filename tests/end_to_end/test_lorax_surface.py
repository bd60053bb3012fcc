"""All of LoRAX's surface, and TGI's, through their clients: against transformers where it counts.

The server prefills in chunks of 13 tokens, so that every prompt of these tests has several.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import lorax
import pytest

from tests.end_to_end.oracle import Oracle
from tests.end_to_end.server import Server

STORY = "Once upon a time, in a small village at the foot of a mountain, there lived a woman who"
EXAMPLE = Path(__file__).parents[2] / "examples" / "detect_watermark.py"
ADAPTERS = [None, "all_linear"]
CLOSE = 2e-3  # both sides are fp32, and add up in another order

pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], adapter_root: Path) -> Server:
    return serve(adapter_root=adapter_root, dtype="float32", prefill_chunk_tokens=13, rows=16)


@pytest.fixture
def client(server: Server) -> lorax.Client:
    return lorax.Client(server.url, timeout=300)


@pytest.fixture
def tgi(server: Server) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(server.url, timeout=300)


def ids_of(oracle: Oracle, text: str) -> list[int]:
    ids: list[int] = oracle.tokenizer(text).input_ids
    return ids


def details_of(response: Any) -> Any:
    assert response.details is not None
    return response.details


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_tokens_of_the_prompt_and_their_log_probabilities_are_transformers(
    client: lorax.Client, oracle: Oracle, adapter: str | None
) -> None:
    prefill = details_of(
        client.generate(STORY, adapter, max_new_tokens=1, decoder_input_details=True)
    ).prefill
    ids = ids_of(oracle, STORY)
    assert [token.id for token in prefill] == ids
    assert "".join(token.text for token in prefill) == STORY
    expected = oracle.logprobs(ids, adapter)
    assert prefill[0].logprob is None
    for at, token in enumerate(prefill[1:]):
        assert token.logprob == pytest.approx(float(expected[at][token.id]), abs=CLOSE)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alternatives_are_the_likeliest_tokens_of_transformers(
    client: lorax.Client, oracle: Oracle, adapter: str | None
) -> None:
    tokens = details_of(
        client.generate(STORY, adapter, max_new_tokens=8, return_k_alternatives=4)
    ).tokens
    ids = ids_of(oracle, STORY)
    produced = [token.id for token in tokens]
    expected = oracle.logprobs(ids + produced, adapter)[len(ids) - 1 :]
    for token, of_all in zip(tokens, expected, strict=False):
        values = of_all.topk(4).values.tolist()
        given = [one.logprob for one in token.alternative_tokens]
        assert given == pytest.approx(values, abs=CLOSE)
        assert token.alternative_tokens[0].id == token.id  # it is greedy
        assert token.alternative_tokens[0].text == oracle.tokenizer.decode([token.id])


@pytest.mark.parametrize("kept", [1, 9, 14])
def test_a_truncated_prompt_is_its_last_tokens(
    client: lorax.Client, oracle: Oracle, kept: int
) -> None:
    ids = ids_of(oracle, STORY)[-kept:]
    details = details_of(
        client.generate(STORY, max_new_tokens=5, truncate=kept, decoder_input_details=True)
    )
    assert [token.id for token in details.prefill] == ids
    assert details.prompt_tokens == kept
    alone = client.generate(oracle.tokenizer.decode(ids), max_new_tokens=5)
    assert [one.id for one in details.tokens] == [one.id for one in details_of(alone).tokens]


def test_a_prompt_that_is_too_long_is_rescued_by_truncating_it(client: lorax.Client) -> None:
    long = "word " * 20_000
    with pytest.raises(lorax.errors.ValidationError, match="must have less than"):
        client.generate(long, max_new_tokens=2)
    rescued = client.generate(long, max_new_tokens=2, truncate=20, decoder_input_details=True)
    assert len(details_of(rescued).prefill) == 20


def test_the_best_is_the_likeliest_of_those_that_differ(client: lorax.Client) -> None:
    details = details_of(
        client.generate(STORY, max_new_tokens=6, temperature=1.5, best_of=4, do_sample=True)
    )
    others = details.best_of_sequences

    def mean(sequence: Any) -> float:
        return float(sum(one.logprob for one in sequence.tokens) / len(sequence.tokens))

    means = [mean(sequence) for sequence in (details, *others)]
    assert len(means) == 4
    assert means == sorted(means, reverse=True)
    texts = {tuple(one.id for one in sequence.tokens) for sequence in (details, *others)}
    assert len(texts) == 4
    again = client.generate(STORY, max_new_tokens=6, temperature=1.5, seed=details.seed)
    assert [one.id for one in details_of(again).tokens] == [one.id for one in details.tokens]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_inputs_may_be_a_chat(server: Server, adapter: str | None) -> None:
    """The template is the one of the chat route."""
    question = "What is the capital of France?"
    said = server.generate(question, adapter, max_new_tokens=8, apply_chat_template=True)
    chat = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={
            "model": adapter or "",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        },
        timeout=300,
    ).json()
    assert said["generated_text"] == chat["choices"][0]["message"]["content"]
    assert said["details"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    plain = server.generate(question, adapter, max_new_tokens=8)
    assert said["generated_text"] != plain["generated_text"]


def test_a_stream_says_what_the_whole_reply_says_to_both_kinds_of_clients(
    server: Server, client: lorax.Client
) -> None:
    asked: dict[str, Any] = {"adapter_id": "all_linear", "max_new_tokens": 10, "seed": 3}
    asked |= {"do_sample": True, "return_k_alternatives": 2}
    whole = client.generate(STORY, **asked)

    async def streamed() -> list[Any]:
        stream = lorax.AsyncClient(server.url).generate_stream(STORY, **asked)
        return [one async for one in stream]

    told = asyncio.run(streamed())
    assert [one.token for one in told] == details_of(whole).tokens
    assert told[-1].generated_text == whole.generated_text
    assert details_of(told[-1]).seed == details_of(whole).seed == 3
    del asked["return_k_alternatives"]
    told = list(client.generate_stream(STORY, **asked))
    assert told[-1].generated_text == whole.generated_text


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_watermark_is_found_where_there_is_one(server: Server, adapter: str | None) -> None:
    def found(text: str, *flags: str) -> float:
        command = [sys.executable, str(EXAMPLE), "--url", server.url, *flags]
        run = subprocess.run(command, input=text, check=True, capture_output=True, text=True)
        return float(run.stdout)

    asked: dict[str, Any] = {"max_new_tokens": 150, "do_sample": True, "seed": 1}
    marked = server.generate(STORY, adapter, watermark=True, **asked)["generated_text"]
    plain = server.generate(STORY, adapter, **asked)["generated_text"]
    assert found(marked) > 4 > found(plain)
    assert found(marked, "--key", "1") < 4


def test_a_text_is_tokenized_as_it_is_for_a_prompt(server: Server, oracle: Oracle) -> None:
    text = STORY + " 🏔️ naïve"
    reply = httpx.post(f"{server.url}/tokenize", json={"inputs": text}, timeout=60).json()
    encoded = oracle.tokenizer(text, return_offsets_mapping=True)
    assert [token["id"] for token in reply] == encoded.input_ids
    assert [(token["start"], token["stop"]) for token in reply] == encoded.offset_mapping
    pieces = oracle.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert [token["text"] for token in reply] == pieces


def test_the_server_has_started_and_tells_its_facts(server: Server) -> None:
    for path in ("/startup", "/health", "/ping", "/"):
        assert httpx.get(server.url + path, timeout=60).status_code == 200
    facts = httpx.get(f"{server.url}/info").json()
    assert facts["model_dtype"] == "torch.float32"
    assert facts["max_batch_total_tokens"] > facts["max_total_tokens"] > 0


def test_the_headers_that_load_tests_read_are_there(server: Server) -> None:
    body = {"inputs": STORY, "parameters": {"max_new_tokens": 4, "adapter_id": "all_linear"}}
    for path in ("/generate", "/invocations"):
        headers = httpx.post(server.url + path, json=body, timeout=60).headers
        for name in ("total-time", "validation-time", "queue-time", "inference-time"):
            assert int(headers[f"x-{name}"]) >= 0
        assert int(headers["x-time-per-token"]) >= 0
        assert int(headers["x-total-tokens"]) == int(headers["x-prompt-tokens"]) + 4
        assert headers["x-adapter-id"] == "all_linear"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tgis_client_generates_with_all_details(
    tgi: huggingface_hub.InferenceClient, oracle: Oracle, adapter: str | None
) -> None:
    reply = tgi.text_generation(
        STORY,
        adapter_id=adapter,
        max_new_tokens=6,
        details=True,
        decoder_input_details=True,
        top_n_tokens=3,
    )
    details = details_of(reply)
    assert [token.id for token in details.prefill] == ids_of(oracle, STORY)
    assert "".join(token.text for token in details.tokens) == reply.generated_text
    for token, tops in zip(details.tokens, details.top_tokens, strict=True):
        assert len(tops) == 3
        assert tops[0]["id"] == token.id
    told = list(
        tgi.text_generation(STORY, adapter_id=adapter, max_new_tokens=6, stream=True, details=True)
    )
    assert [one.token.id for one in told] == [token.id for token in details.tokens]
    assert [one.index for one in told] == list(range(1, len(told) + 1))
    assert details_of(told[-1]).input_length == len(details.prefill)


def test_tgis_client_chats(tgi: huggingface_hub.InferenceClient) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logprobs": True}
    for model in (None, "all_linear"):
        whole = tgi.chat_completion(question, model=model, top_logprobs=2, **asked)
        assert whole.choices[0].logprobs is not None
        stream = tgi.chat_completion(question, model=model, stream=True, **asked)
        texts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(texts) == whole.choices[0].message.content
