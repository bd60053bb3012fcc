"""Log-probabilities, choices, echoes and biases through OpenAI's client, against transformers.

The server prefills in chunks of 13 tokens, so that every prompt of these tests has several.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.end_to_end.oracle import Oracle
from tests.end_to_end.server import Server, eventually

STORY = "Once upon a time, in a small village at the foot of a mountain, there lived a woman who"
QUESTION: Any = [{"role": "user", "content": "Write one line about the sea, with an emoji."}]
ADAPTERS = [None, "all_linear"]
CLOSE = 2e-3  # both sides are fp32, and add up in another order


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], adapter_root: Path) -> Server:
    return serve(adapter_root=adapter_root, dtype="float32", prefill_chunk_tokens=13, rows=16)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def ids_of(oracle: Oracle, text: str) -> list[int]:
    ids: list[int] = oracle.tokenizer(text).input_ids
    return ids


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_those_of_a_prompt_are_transformers(
    client: openai.OpenAI, oracle: Oracle, adapter: str | None
) -> None:
    reply = client.completions.create(
        model=adapter or "", prompt=STORY, echo=True, logprobs=3, max_tokens=0
    )
    [choice] = reply.choices
    assert choice.text == STORY
    given = choice.logprobs
    assert given is not None
    assert given.token_logprobs
    assert given.top_logprobs
    assert given.tokens
    ids = ids_of(oracle, STORY)
    expected = oracle.logprobs(ids, adapter)
    assert len(given.token_logprobs) == len(ids)
    assert given.token_logprobs[0] is None
    for at, token_id in enumerate(ids[1:], start=1):
        of_all = expected[at - 1]
        assert given.token_logprobs[at] == pytest.approx(float(of_all[token_id]), abs=CLOSE)
        values = of_all.topk(3).values.tolist()
        likeliest = sorted(given.top_logprobs[at].values(), reverse=True)
        assert likeliest[:3] == pytest.approx(values, abs=CLOSE)
    offsets = [*(given.text_offset or []), len(STORY)]
    pieces = [STORY[start:end] for start, end in itertools.pairwise(offsets)]
    assert pieces == given.tokens
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_those_of_produced_tokens_are_transformers_whatever_they_are_drawn_from(
    server: Server, oracle: Oracle, adapter: str | None
) -> None:
    """Also with penalties, temperature and filters, which are not in them."""
    details = server.generate(
        STORY,
        adapter,
        max_new_tokens=12,
        do_sample=True,
        seed=3,
        temperature=1.4,
        top_p=0.95,
        repetition_penalty=1.2,
    )["details"]
    ids = [token["id"] for token in details["tokens"]]
    prompt = ids_of(oracle, STORY)
    expected = oracle.logprobs(prompt + ids, adapter)[len(prompt) - 1 :]
    for token, of_all in zip(details["tokens"], expected, strict=False):
        assert token["logprob"] == pytest.approx(float(of_all[token["id"]]), abs=CLOSE)


def test_a_chats_are_those_of_a_greedy_run(client: openai.OpenAI, oracle: Oracle) -> None:
    reply = client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=20, temperature=0, logprobs=True, top_logprobs=4
    )
    [choice] = reply.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.message.content is not None
    joined = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert joined == choice.message.content.encode()
    written = oracle.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=False
    )
    prompt = ids_of(oracle, str(written))
    ids = ids_of(oracle, choice.message.content)
    assert len(ids) == len(choice.logprobs.content)  # its text is encoded as it was produced
    expected = oracle.logprobs(prompt + ids)[len(prompt) - 1 :]
    for token, token_id, of_all in zip(choice.logprobs.content, ids, expected, strict=False):
        values, likeliest = of_all.topk(4)
        assert token_id == likeliest[0]
        assert token.logprob == pytest.approx(float(values[0]), abs=CLOSE)
        given = [one.logprob for one in token.top_logprobs]
        assert given == pytest.approx(values.tolist(), abs=CLOSE)
        assert token.top_logprobs[0].bytes == token.bytes


def test_a_prompt_is_scored_though_its_prefix_is_cached(client: openai.OpenAI) -> None:
    def score() -> list[float | None]:
        reply = client.completions.create(
            model="", prompt=STORY, echo=True, logprobs=0, max_tokens=1
        )
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return list(logprobs.token_logprobs[:-1])

    client.completions.create(model="", prompt=STORY, max_tokens=1)
    first = score()
    client.completions.create(model="", prompt=STORY, max_tokens=1)
    assert score() == pytest.approx(first, abs=CLOSE)


def test_the_first_of_several_choices_is_a_lone_one_and_the_others_differ(
    client: openai.OpenAI,
) -> None:
    def ask(**changes: Any) -> list[str]:
        reply = client.completions.create(
            model="", prompt=STORY, max_tokens=12, temperature=1.2, seed=9, **changes
        )
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= 12 * len(reply.choices)
        return [choice.text for choice in reply.choices]

    [alone] = ask()
    several = ask(n=4)
    assert several[0] == alone
    assert len(set(several)) == 4
    assert ask(n=4) == several


def test_choices_share_their_prompt_through_the_prefix_cache(
    server: Server, client: openai.OpenAI
) -> None:
    name = "loradex_prefix_cache_hit_tokens_total"
    client.completions.create(model="", prompt="Something else", max_tokens=1)
    before = server.metric(name)
    prompt = f"{STORY} had a cat that was called Minou, and a dog that was not called at all"
    reply = client.completions.create(model="", prompt=prompt, max_tokens=2, n=4)
    assert reply.usage is not None
    # block 0 of the story is cached from other tests; the others' are the new ones
    whole_blocks = (reply.usage.prompt_tokens - 1) // 16 * 16
    assert eventually(lambda: server.metric(name) - before >= 3 * whole_blocks)


def test_a_stream_of_several_choices_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "all_linear",
        "messages": QUESTION,
        "max_tokens": 12,
        "seed": 4,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts: defaultdict[int, str] = defaultdict(str)
    tokens: defaultdict[int, list[Any]] = defaultdict(list)
    usage = None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.content or []
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert choice.logprobs is not None
        assert [one.token for one in tokens[choice.index]] == [
            one.token for one in choice.logprobs.content or []
        ]


def test_the_asynchronous_client_streams_them_too(server: Server) -> None:
    async def ask() -> tuple[list[str], dict[int, str]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="EMPTY") as client:
            asked: dict[str, Any] = {
                "model": "",
                "prompt": [STORY, "def fibonacci(n):\n    "],
                "max_tokens": 8,
                "seed": 2,
                "n": 2,
            }
            whole = await client.completions.create(**asked)
            texts: defaultdict[int, str] = defaultdict(str)
            async for chunk in await client.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            return [choice.text for choice in whole.choices], texts

    whole, streamed = asyncio.run(ask())
    assert len(whole) == 4
    assert [streamed[index] for index in range(4)] == whole


def test_prompts_of_a_list_are_answered_as_alone(client: openai.OpenAI, oracle: Oracle) -> None:
    prompts = [STORY, "The capital of France is", "def fibonacci(n):\n    "]

    def ask(prompt: Any) -> list[str]:
        reply = client.completions.create(model="", prompt=prompt, max_tokens=8, temperature=0)
        return [choice.text for choice in reply.choices]

    alone = [ask(prompt)[0] for prompt in prompts]
    assert ask(prompts) == alone
    assert ask([ids_of(oracle, prompt) for prompt in prompts]) == alone
    assert ask(ids_of(oracle, STORY)) == alone[:1]


def test_token_ids_are_echoed_as_their_text(client: openai.OpenAI, oracle: Oracle) -> None:
    reply = client.completions.create(
        model="", prompt=ids_of(oracle, STORY), echo=True, max_tokens=4, temperature=0, stop="\n"
    )
    assert reply.choices[0].text.startswith(STORY)


def test_the_best_is_the_one_with_the_likeliest_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "",
        "prompt": STORY,
        "max_tokens": 6,
        "temperature": 1.5,
        "seed": 5,
        "logprobs": 0,
    }

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    all_of_them = client.completions.create(**asked, n=5).choices
    best = client.completions.create(**asked, n=2, best_of=5).choices
    ranked = sorted(all_of_them, key=mean, reverse=True)
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]
    assert mean(best[0]) == pytest.approx(mean(ranked[0]), abs=CLOSE)


def test_biases_ban_tokens_and_force_them(client: openai.OpenAI, oracle: Oracle) -> None:
    def ask(**bias: int) -> str:
        reply = client.completions.create(
            model="", prompt=STORY, max_tokens=6, temperature=0, logit_bias=bias
        )
        return reply.choices[0].text

    usual = ids_of(oracle, ask())
    assert ask(**{str(usual[0]): -100}) != ask()
    [word] = ids_of(oracle, " sea")
    assert ask(**{str(word): 100}) == " sea" * 6


def test_a_reply_has_at_least_as_many_tokens_as_it_must(
    client: openai.OpenAI, oracle: Oracle
) -> None:
    """Though its end is the likeliest token from the first on."""

    def ask(least: int) -> int:
        reply = client.completions.create(
            model="",
            prompt=STORY,
            max_tokens=12,
            logit_bias={str(oracle.tokenizer.eos_token_id): 100},
            extra_body={"min_tokens": least},
        )
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        return reply.usage.completion_tokens

    assert [ask(least) for least in (0, 1, 6)] == [1, 2, 7]


def test_a_token_that_ends_it_is_its_last(client: openai.OpenAI, oracle: Oracle) -> None:
    usual = client.completions.create(model="", prompt=STORY, max_tokens=8, temperature=0)
    ids = ids_of(oracle, usual.choices[0].text)
    ended = client.completions.create(
        model="",
        prompt=STORY,
        max_tokens=8,
        temperature=0,
        extra_body={"stop_token_ids": [ids[3]]},
    )
    assert ended.usage is not None
    assert ended.usage.completion_tokens == ids.index(ids[3]) + 1
    assert ended.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "parameter"),
    [
        ({"logit_bias": {"999999": 1}}, None),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"n": 1000}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_is_said_with_its_parameter(
    client: openai.OpenAI, asked: dict[str, Any], parameter: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="", prompt="Hi", **asked)
    if parameter is not None:
        assert str(wrong.value.param).startswith(parameter)


def test_a_client_that_leaves_takes_all_choices_with_it(
    server: Server, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model="", prompt=STORY, max_tokens=1500, n=8, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    assert eventually(lambda: server.metric("loradex_requests_running") == 0)
    assert server.metric("loradex_requests_in_flight") == 0


def test_a_model_is_found_by_its_id(client: openai.OpenAI) -> None:
    assert client.models.retrieve("all_linear").id == "all_linear"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
