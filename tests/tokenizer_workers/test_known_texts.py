"""Which prompts wait to hear what their adapters ship, and what they hear, as a list of calls."""

import random
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.messages import (
    MERGED,
    REQUEST_BITS,
    AdapterKey,
    AdapterTexts,
    AskTexts,
    Failure,
    FailureKind,
    ForgetTexts,
    Merge,
    MergePart,
    MergeStrategy,
    Prompt,
    TokenizerCompared,
)
from tokenizer_workers import known_texts
from tokenizer_workers.known_texts import KnownTexts
from tokenizer_workers.own_texts import NOTHING, OwnTexts

A, B = AdapterKey("local", "a"), AdapterKey("hub", "b", scope="of a tenant")
BASE = "digest of the base model's"
REVALIDATE, WAIT = 60.0, 300.0
DOWN = Failure(503, FailureKind.ADAPTER_UNAVAILABLE, "the hub cannot be reached")
GONE = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "it is gone")
T = {"t": b"template"}
TEMPLATE = OwnTexts(template="template")


def read(files: Mapping[str, bytes]) -> OwnTexts:
    """The one file is a template, or a problem."""
    if not files:
        return NOTHING
    ((name, content),) = files.items()
    text = content.decode()
    return OwnTexts(template=text) if name == "t" else OwnTexts(problem=text)


def known(revalidate_seconds: float = REVALIDATE) -> KnownTexts:
    return KnownTexts(
        worker=3,
        read=read,
        base_tokenizer=BASE,
        revalidate_seconds=revalidate_seconds,
        wait_seconds=WAIT,
    )


def prompt(request_id: int = 1, adapter: AdapterKey = A) -> Prompt:
    token = "secret" if adapter.scope else None
    return Prompt(request_id, 0.0, text="Hi", adapter=adapter, adapter_token=token)


def question(texts: KnownTexts) -> AskTexts:
    """The one that is asked now."""
    (one,) = texts.take_questions()
    return one


def answer(one: AskTexts, files: Any = None, version: str = "1", **given: Any) -> AdapterTexts:
    return AdapterTexts(one.question_id, one.adapter, version, files, **given)


def ready(texts: KnownTexts) -> list[tuple[int, Any]]:
    """Request, and what it hears: texts or the sentence."""
    return [
        (one.request_id, str(own) if isinstance(own, RequestError) else own)
        for one, own in texts.take_ready()
    ]


def merge(*parts: AdapterKey) -> AdapterKey:
    named = tuple(MergePart(part, 1.0) for part in parts)
    return AdapterKey(MERGED, "both", merge=Merge(named, MergeStrategy.LINEAR))


def test_the_first_prompt_waits_and_the_next_ones_know() -> None:
    texts = known()
    assert texts.of(prompt(1), now=0) is None
    assert texts.of(prompt(2), now=1) is None
    assert (1 in texts, 3 in texts, len(texts)) == (True, False, 2)
    one = question(texts)
    assert one == AskTexts(1, 3, A, None, "", (BASE,))
    texts.told(answer(one, T), now=2)
    assert ready(texts) == [(1, TEMPLATE), (2, TEMPLATE)]
    assert texts.of(prompt(3), now=3) == TEMPLATE
    assert (texts.take_questions(), len(texts)) == ([], 0)


def test_an_adapter_that_ships_nothing_costs_one_question() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), {}), now=1)
    assert ready(texts) == [(1, NOTHING)]
    assert [texts.of(prompt(2), now=at) for at in range(2, 29)] == [NOTHING] * 27
    assert not texts.take_questions()


def test_it_is_asked_again_beside_the_prompts_and_then_before_them() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), T), now=20)  # what counts is when it was asked
    texts.take_ready()
    assert texts.of(prompt(2), now=30) == TEMPLATE
    again = question(texts)
    assert again.known == "1"
    assert texts.of(prompt(3), now=31) == TEMPLATE
    assert not texts.take_questions()
    assert texts.of(prompt(4), now=61) is None
    assert not texts.take_questions()
    texts.told(answer(again, None), now=62)
    assert ready(texts) == [(4, TEMPLATE)]


def test_other_content_is_noticed() -> None:
    texts = known(revalidate_seconds=0)
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), T), now=1)
    texts.take_ready()
    assert texts.of(prompt(2), now=2) is None
    texts.told(answer(question(texts), {"t": b"new"}, "2"), now=3)
    assert ready(texts) == [(2, OwnTexts(template="new"))]


def test_a_tokenizer_that_nobody_knows_is_compared_once() -> None:
    texts = known()
    texts.of(prompt(1), now=0)
    texts.of(prompt(2, B), now=0)
    for one in texts.take_questions():
        texts.told(answer(one, {**T, "tokenizer.json": b"{}"}, tokenizer="x"), now=1)
    (compare,) = texts.take_comparisons()
    assert (compare.tokenizer, compare.content) == ("x", b"{}")
    assert (ready(texts), len(texts)) == ([], 2)
    texts.compared(TokenizerCompared("x"), now=2)
    assert ready(texts) == [(1, TEMPLATE), (2, TEMPLATE)]

    other = AdapterKey("local", "other")
    texts.of(prompt(3, other), now=3)
    one = question(texts)
    assert one.known_tokenizers == (BASE, "x"), "so that it need not be sent"
    texts.told(answer(one, T, tokenizer="x"), now=4)
    assert ready(texts) == [(3, TEMPLATE)]
    assert not texts.take_comparisons()


def test_the_base_models_own_tokenizer_is_not_compared() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), T, tokenizer=BASE), now=1)
    assert ready(texts) == [(1, TEMPLATE)]
    assert not texts.take_comparisons()


def test_a_tokenizer_that_disagrees_is_a_problem_with_its_adapters_name() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), {"tokenizer.json": b"{}"}, tokenizer="x"), now=1)
    texts.compared(TokenizerCompared("x", "it lacks the token 'a'"), now=2)
    ((_, own),) = ready(texts)
    assert own.problem.startswith(
        "adapter a: its tokenizer.json disagrees: it lacks the token 'a'; train it with the base"
    )
    assert texts.of(prompt(2), now=3) == own
    refused = known_texts.refusal(own)
    assert (refused.status, refused.kind) == (422, FailureKind.ADAPTER_INVALID)


def test_more_tokenizers_than_may_be_compared_at_once_are_to_be_tried_again() -> None:
    texts = known()
    keys = [AdapterKey("local", str(number)) for number in range(known_texts.MAX_COMPARING + 1)]
    for number, key in enumerate(keys):
        texts.of(prompt(number, key), now=0)
    for one in texts.take_questions():
        content = {"tokenizer.json": b"{}"}
        texts.told(answer(one, content, tokenizer=f"tokenizer of {one.adapter.id}"), now=1)
    assert len(texts.take_comparisons()) == known_texts.MAX_COMPARING
    ((request_id, sentence),) = ready(texts)
    assert request_id == known_texts.MAX_COMPARING
    assert sentence.endswith("too many others are; try again")
    texts.compared(TokenizerCompared("tokenizer of 0"), now=2)
    texts.of(prompt(100, keys[-1]), now=3)
    again = question(texts)
    texts.told(answer(again, {"tokenizer.json": b"{}"}, tokenizer="the last"), now=4)
    assert [one.tokenizer for one in texts.take_comparisons()] == ["the last"]


def test_a_failure_ends_those_that_wait_and_nothing_is_kept_of_it() -> None:
    texts = known()
    texts.of(prompt(1), now=0)
    texts.of(prompt(2, B), now=0)
    a, b = texts.take_questions()
    texts.told(answer(a, failure=DOWN), now=1)
    assert ready(texts) == [(1, "adapter a: the hub cannot be reached")]
    assert texts.of(prompt(3), now=2) is None
    assert question(texts).known == ""
    texts.told(answer(b, failure=GONE), now=3)
    assert ready(texts) == [(2, "adapter b: it is gone")]


def test_where_nobody_can_be_asked_what_is_known_holds_on() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), T), now=0)
    texts.take_ready()
    assert texts.of(prompt(2), now=100) is None
    texts.told(answer(question(texts), failure=DOWN), now=110)
    assert ready(texts) == [(2, TEMPLATE)]
    assert texts.of(prompt(3), now=111) == TEMPLATE
    assert question(texts).known == "1", "it is asked again beside"


def test_a_refusal_ends_what_is_known() -> None:
    texts = known()
    texts.of(prompt(), now=0)
    texts.told(answer(question(texts), T), now=0)
    texts.take_ready()
    texts.of(prompt(2), now=40)
    texts.take_ready()
    texts.told(answer(question(texts), failure=GONE), now=41)
    assert texts.of(prompt(3), now=42) is None


def test_what_is_to_be_forgotten_is_asked_anew_and_the_older_answer_does_not_count() -> None:
    texts = known()
    texts.of(prompt(1), now=0)
    old = question(texts)
    texts.forget(ForgetTexts(A), now=1)
    new = question(texts)
    texts.told(answer(old, T), now=2)
    assert ready(texts) == []
    texts.told(answer(new, {"t": b"new"}), now=3)
    assert ready(texts) == [(1, OwnTexts(template="new"))]
    texts.forget(ForgetTexts(A), now=4)
    assert texts.of(prompt(2), now=5) is None


def test_what_is_forgotten_while_it_is_compared_is_asked_anew() -> None:
    texts = known()
    texts.of(prompt(1), now=0)
    texts.told(answer(question(texts), {"tokenizer.json": b"{}"}, tokenizer="x"), now=1)
    texts.forget(ForgetTexts(A), now=2)
    new = question(texts)
    texts.compared(TokenizerCompared("x", "no"), now=3)
    texts.told(answer(new, {}), now=4)
    assert ready(texts) == [(1, NOTHING)]


def test_each_tenants_view_of_an_adapter_is_asked_with_its_token_and_known_alone() -> None:
    texts = known()
    texts.of(prompt(1, B), now=0)
    one = question(texts)
    assert (one.adapter, one.adapter_token) == (B, "secret")
    texts.told(answer(one, T), now=1)
    texts.take_ready()
    stranger = AdapterKey("hub", "b", scope="of another")
    assert texts.of(prompt(2, stranger), now=2) is None
    assert texts.of(prompt(3, B.public), now=2) is None
    assert [one.adapter for one in texts.take_questions()] == [stranger, B.public]
    assert "secret" not in repr(one)


def test_a_merge_has_what_all_of_its_parts_have() -> None:
    texts = known()
    both = merge(A, B)
    assert texts.of(prompt(1, both), now=0) is None
    a, b = texts.take_questions()
    assert (a.adapter, b.adapter) == (A, B)
    texts.told(answer(a, T), now=1)
    assert ready(texts) == []
    texts.told(answer(b, T), now=2)
    assert ready(texts) == [(1, TEMPLATE)]
    texts.forget(ForgetTexts(B), now=3)
    assert texts.of(prompt(2, both), now=4) is None, "the other part is known already"
    texts.told(answer(question(texts), {}), now=5)
    assert ready(texts) == [(2, NOTHING)]


def test_a_merge_is_refused_for_one_of_its_parts() -> None:
    texts = known()
    texts.of(prompt(1, merge(A, B)), now=0)
    a, b = texts.take_questions()
    texts.told(answer(a, {"p": b"its file is bad"}), now=1)
    ((_, own),) = ready(texts)
    assert own.problem == "adapter both: part a: its file is bad"
    texts.of(prompt(2, merge(B, AdapterKey("hub", "c"))), now=1)
    texts.told(answer(b, failure=GONE), now=2)
    assert ready(texts) == [(2, "adapter both: part b: it is gone")]


def test_nobody_waits_for_ever_and_a_lost_question_is_asked_again() -> None:
    texts = known()
    texts.of(prompt(1), now=0)
    one = question(texts)
    texts.expire(now=9)
    assert texts.take_questions() == []
    texts.expire(now=10)
    assert texts.take_questions() == [one]
    texts.expire(now=WAIT)
    assert ready(texts) == [(1, "adapter a: its files were not read within 300 seconds")]
    texts.of(prompt(2), now=WAIT + 1)
    assert len(texts.take_questions()) == 1


def test_who_is_cancelled_or_whose_frontend_goes_hears_nothing() -> None:
    texts = known()
    second = 1 << REQUEST_BITS
    for request_id in (1, 2, second):
        texts.of(prompt(request_id), now=0)
    texts.cancel(1)
    texts.forget_frontend(1)
    texts.told(answer(question(texts), {}), now=1)
    assert ready(texts) == [(2, NOTHING)]


def test_what_was_used_least_recently_goes() -> None:
    large = b"x" * (known_texts.MAX_CHARACTERS // 3)
    texts = known()
    keys = [AdapterKey("local", name) for name in "abcd"]
    for key in keys[:3]:
        texts.of(prompt(1, key), now=0)
        texts.told(answer(question(texts), {"t": large}), now=0)
    texts.take_ready()
    assert texts.of(prompt(2, keys[0]), now=1) is not None
    texts.of(prompt(3, keys[3]), now=2)
    texts.told(answer(question(texts), {"t": large}), now=2)
    assert [texts.of(prompt(4, key), now=3) is not None for key in keys] == [
        True,
        False,
        True,
        True,
    ]


@given(seed=st.integers(0, 1 << 30))
def test_whatever_happens_each_prompt_hears_once(seed: int) -> None:
    draw = random.Random(seed)
    texts = known(revalidate_seconds=draw.choice([0, 5, 60]))
    keys = [A, B, AdapterKey("local", "c"), merge(A, B), merge(B, B)]
    heard: dict[int, int] = {}
    asked: list[AskTexts] = []
    comparing: list[str] = []
    now = 0.0
    for step in range(60):
        now += draw.choice([0, 0.5, 7, 30])
        action = draw.randrange(6)
        if action <= 1:
            heard[step] = 0
            if texts.of(prompt(step, draw.choice(keys)), now) is not None:
                heard[step] = 1
        elif action == 2 and asked:
            one = asked.pop(draw.randrange(len(asked)))
            kind = draw.randrange(4)
            if kind == 0:
                texts.told(answer(one, failure=draw.choice([DOWN, GONE])), now)
            elif kind == 1 and one.known:
                texts.told(answer(one, None, one.known), now)
            else:
                tokenizer = draw.choice(["", "x", "y", BASE])
                sent = tokenizer and tokenizer not in one.known_tokenizers
                files = {"tokenizer.json": b"{}"} if sent else {}
                version = draw.choice("12")
                texts.told(answer(one, files, version, tokenizer=tokenizer), now)
        elif action == 3 and comparing:
            texts.compared(TokenizerCompared(comparing.pop()), now)
        elif action == 4:
            texts.forget(ForgetTexts(draw.choice(keys[:3])), now)
        else:
            texts.expire(now)
        asked += texts.take_questions()
        comparing += [one.tokenizer for one in texts.take_comparisons()]
        for one_prompt, _ in texts.take_ready():
            heard[one_prompt.request_id] += 1
    while asked or comparing:
        for one in asked:
            texts.told(answer(one, {}), now)
        asked = texts.take_questions()
        for tokenizer in comparing:
            texts.compared(TokenizerCompared(tokenizer), now)
        comparing = [one.tokenizer for one in texts.take_comparisons()]
        for one_prompt, _ in texts.take_ready():
            heard[one_prompt.request_id] += 1
        asked += texts.take_questions()
    assert set(heard.values()) <= {1}
    assert len(texts) == 0


def test_a_loader_that_was_started_again_is_asked_again_at_once() -> None:
    texts = known()
    texts.of(prompt(), now=0.0)
    asked = question(texts)
    texts.loader_started(now=1.0)
    assert question(texts) == asked
    texts.told(answer(asked, T), now=2.0)
    assert ready(texts) == [(1, TEMPLATE)]
    texts.loader_started(now=3.0)
    assert texts.take_questions() == []
