"""A tokenizer worker may die between any two messages, and no client sees a difference."""

import asyncio
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import ChatOptions, Grammar, GrammarKind, Logprobs, Prompt
from tests.replay.node import Node, Said, said

MOST_DEATHS = 4  # one more and it is the request that is blamed, see restart_limit
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"stop": ("#",)},
    {"stop": ("ab", "fe"), "keep_stop": True},
    {"token_details": True, "stop": ("c",)},
    {"token_details": True, "logprobs": Logprobs(1), "choices": 3},
    {"prompt_details": True, "choices": 2, "stop": ("A",)},
    {"prompt_details": True, "logprobs": Logprobs(1, prompt_top=1), "token_details": True},
    {"ignore_eos": True},
    {"chat_options": ChatOptions(template="{{ own }}"), "choices": 2},
    {"grammar": Grammar(GrammarKind.REGEX, "good"), "token_details": True},
    {"grammar": Grammar(GrammarKind.REGEX, "bad"), "choices": 2},
)


def prompt(number: int) -> Prompt:
    """Of each kind, and of other lengths."""
    text = "once upon a time "[number % 5 :] + str(number)
    way = WAYS[number % len(WAYS)]
    is_chat = "chat_options" in way
    return Prompt(
        request_id=0,
        arrived=0.0,
        text=None if is_chat else text,
        chat=[{"role": "user", "content": text}] if is_chat else None,
        max_tokens=3 + number % 23,
        **way,
    )


async def converse(seed: int, *, numbers: list[int], workers: int, deaths: float) -> list[Said]:
    """What clients see, if a worker dies with this probability whenever anything has happened."""
    choose = random.Random(seed)
    node = Node(choose, workers=workers)
    waiting = list(numbers)
    replies = []
    leaving = 0
    while True:
        if waiting and choose.random() < 0.2:
            replies.append(node.ask(prompt(waiting.pop(0))))
        if choose.random() < 0.02:  # a client that goes
            leaving += 1
            with node.frontend.start(prompt(choose.randrange(99)), streamed=True):
                for _ in range(choose.randrange(30)):
                    node.go_on()
        for place in node.workers:
            risk = 5 * deaths if node.is_ending(place) else deaths
            if choose.random() < risk and node.deaths < MOST_DEATHS:
                node.kill(place)
        if not node.go_on():
            for place in node.workers:
                node.flush(place)
            if not waiting and not node.go_on():
                break
    seen = [one for reply in replies for one in await said(reply)]
    node.leave()
    while node.go_on() or any(core.requests for core in node.workers.values()):
        for place in node.workers:
            node.flush(place)
    for place in node.workers:
        node.flush(place)
    while node.go_on():
        pass
    assert node.scheduler.idle
    assert node.scheduler.figures().replies_kept == 0
    assert node.scheduler.figures().kv_blocks_used == 0
    assert node.deaths == 0 or deaths
    return seen


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    first=st.integers(0, 200),
    count=st.integers(1, 12),
    workers=st.integers(1, 2),
    deaths=st.sampled_from((0.005, 0.02, 0.1)),
)
def test_no_client_sees_a_difference(
    seed: int, first: int, count: int, workers: int, deaths: float
) -> None:
    numbers = [*range(first, first + count)]
    undisturbed = asyncio.run(converse(seed, numbers=numbers, workers=workers, deaths=0.0))
    disturbed = asyncio.run(converse(seed, numbers=numbers, workers=workers, deaths=deaths))
    assert disturbed == undisturbed
