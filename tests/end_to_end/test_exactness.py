"""Greedy tokens equal those of transformers + PEFT in fp32, whatever the server does meanwhile."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.oracle import KINDS, Oracle
from tests.end_to_end.server import Server, eventually

TOKENS = 16
ADAPTERS: list[str | None] = [None, *KINDS]
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village at the foot of a mountain, there lived a woman who",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics, in the words that a child of ten would understand, are",
)
# Sixteen requests, each adapter at least once, some of them twice.
MIXED = [(PROMPTS[i % len(PROMPTS)], ADAPTERS[i % len(ADAPTERS)]) for i in range(16)]


def ask_all(server: Server, tokens: int = TOKENS, **parameters: Any) -> list[list[int]]:
    """The answers to MIXED, sent from sixteen threads at different moments."""
    moments = random.Random(7)

    def ask(request: tuple[str, str | None]) -> list[int]:
        time.sleep(moments.random())  # the moment of arrival is what is varied
        return server.token_ids(*request, max_new_tokens=tokens, **parameters)

    with ThreadPoolExecutor(len(MIXED)) as threads:
        return list(threads.map(ask, MIXED))


def is_greedy(oracle: Oracle, prompt: str, adapter: str | None, tokens: list[int]) -> bool:
    return oracle.greedy(prompt, adapter, tokens) == tokens


def all_are_greedy(oracle: Oracle, answers: list[list[int]]) -> bool:
    return all(
        is_greedy(oracle, *request, tokens) for request, tokens in zip(MIXED, answers, strict=True)
    )


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], adapter_root: Path) -> Server:
    return serve(adapter_root=adapter_root, dtype="float32")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alone(server: Server, oracle: Oracle, adapter: str | None) -> None:
    for prompt in PROMPTS[:2]:
        tokens = server.token_ids(prompt, adapter, max_new_tokens=TOKENS)
        assert is_greedy(oracle, prompt, adapter, tokens)


def test_every_kind_of_adapter_changes_the_answer(server: Server) -> None:
    """Else the other tests would say nothing."""
    answers = {
        tuple(
            tuple(server.token_ids(prompt, adapter, max_new_tokens=TOKENS))
            for prompt in PROMPTS[:2]
        )
        for adapter in ADAPTERS
    }
    assert len(answers) == len(ADAPTERS)


def test_in_a_mixed_batch_of_sixteen(server: Server, oracle: Oracle) -> None:
    assert all_are_greedy(oracle, ask_all(server))


def test_after_a_prefix_hit(server: Server, oracle: Oracle) -> None:
    story = " ".join(PROMPTS) * 2
    server.token_ids(story, "all_linear", max_new_tokens=1)
    before = server.metric("loradex_prefix_cache_hit_tokens_total")
    for adapter in ("all_linear", "qv", None):
        prompt = story + " and then"
        tokens = server.token_ids(prompt, adapter, max_new_tokens=TOKENS)
        assert is_greedy(oracle, prompt, adapter, tokens)
    assert eventually(lambda: server.metric("loradex_prefix_cache_hit_tokens_total") > before)


def test_sampled_replies_with_a_seed_are_the_same_alone_and_in_a_batch(server: Server) -> None:
    sampling: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "seed": 11,
    }
    alone = [
        server.token_ids(prompt, adapter, max_new_tokens=TOKENS, **sampling)
        for prompt, adapter in MIXED
    ]
    assert ask_all(server, **sampling) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_with_a_chunk_size_of_seven(
    serve: Callable[..., Server], adapter_root: Path, oracle: Oracle
) -> None:
    server = serve(adapter_root=adapter_root, dtype="float32", prefill_chunk_tokens=7)
    assert all_are_greedy(oracle, ask_all(server))


def test_after_preemption(serve: Callable[..., Server], adapter_root: Path, oracle: Oracle) -> None:
    """Fourteen blocks of 16 tokens, where sixteen requests want more than sixty."""
    block_bytes = 30 * 2 * 3 * 64 * 4 * 16
    server = serve(adapter_root=adapter_root, dtype="float32", kv_cache_bytes=14 * block_bytes)
    assert all_are_greedy(oracle, ask_all(server, tokens=3 * TOKENS))
    assert eventually(lambda: server.metric("loradex_preemptions_total") > 0)
