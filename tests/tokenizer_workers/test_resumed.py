"""A worker that takes the place of another goes on where that one was, at any token."""

from array import array
from typing import Any, NamedTuple

import msgspec
import pytest

from pipeline.logprobs import pack
from pipeline.messages import (
    GONE,
    Cancel,
    End,
    Finished,
    FinishReason,
    Logprobs,
    Piece,
    Pieces,
    Prompt,
    PromptDetails,
    Resumed,
    StillOpen,
    Submit,
    TokenDetail,
    Tokens,
    ToolCallPart,
    Tools,
    Usage,
)
from tests.tokenizer_workers.test_core import core, grammar_core, prompt, sent
from tokenizer_workers.core import Core

CALL = '<tool_call>{"name": "add", "arguments": {"a": "Xy", "b": [1, 2]}}</tool_call>'
PROMPT_ROWS = [pack(-1.0, []), pack(-2.0, [])]
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({}, "abXcdYZe"),
    "a stop string": ({"stop": ("##", "q")}, "abc#d##e"),
    "a stop string that stays": ({"stop": ("##",), "keep_stop": True}, "ab#X##"),
    "no stop string": ({"stop": ("##",)}, "ab#c#"),
    "details": ({"token_details": True, "logprobs": Logprobs(1)}, "abXc"),
    "a prompt's": (
        {"token_details": True, "logprobs": Logprobs(0, prompt_top=0), "prompt_details": True},
        "abc",
    ),
    "calls": ({"tools": Tools([{"name": "add"}])}, f"so {CALL}\n{CALL}"),
    "one call": ({"tools": Tools([{"name": "add"}], parallel=False)}, f"{CALL} and more"),
    "no call": ({"tools": Tools([{"name": "add"}])}, "a <tool_call> b <tool"),
}


class Said(NamedTuple):
    """What a frontend has of a request."""

    text: str
    details: list[TokenDetail]
    calls: dict[int, tuple[str, str]]  # name, arguments
    prompt: PromptDetails | None
    end: tuple[FinishReason, int] | None


def joined(pieces: list[Piece], prompts: list[PromptDetails], ends: list[End]) -> Said:
    parts: list[ToolCallPart] = [part for piece in pieces for part in piece.tool_calls]
    calls: dict[int, tuple[str, str]] = {}
    for part in parts:
        name, arguments = calls.get(part.index, ("", ""))
        calls[part.index] = (name + part.name, arguments + part.arguments)
    assert len(ends) <= 1
    return Said(
        "".join(piece.text for piece in pieces),
        [detail for piece in pieces for detail in piece.tokens],
        calls,
        prompts[-1] if prompts else None,
        (ends[0].reason, ends[0].usage.completion_tokens) if ends else None,
    )


class Reader:
    """The frontend of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.prompts: list[PromptDetails] = []
        self.ends: list[End] = []

    def read(self, worker: Core) -> None:
        for to in worker.take_outbox():
            if isinstance(to.message, PromptDetails):
                self.prompts.append(to.message)
            elif isinstance(to.message, Pieces):
                self.pieces += to.message.pieces
                self.ends += to.message.ends

    @property
    def produced(self) -> int:
        return self.pieces[-1].produced if self.pieces else 0

    @property
    def said(self) -> Said:
        return joined(self.pieces, self.prompts, self.ends)


def steps(given: dict[str, Any], text: str) -> list[Tokens]:
    """What the scheduler says: its last message has the end."""
    is_row_wanted = given.get("logprobs") is not None
    rows = {0: pack(-0.5, [])} if is_row_wanted else {}
    usage = Usage(prompt_tokens=3, completion_tokens=len(text))
    end = (Finished(1, FinishReason.LENGTH, usage),)
    last = len(text) - 1
    return [
        Tokens([1], [ord(letter)], rows, end if at == last else ())
        for at, letter in enumerate(text)
    ]


def resumed(given: dict[str, Any], text: str, *, ended: bool) -> Resumed:
    """What the scheduler says of a request that has come so far."""
    usage = Usage(prompt_tokens=3, completion_tokens=len(text))
    return Resumed(
        request_id=1,
        token_ids=array("i", map(ord, text)).tobytes(),
        logprobs=[pack(-0.5, [])] * len(text) if given.get("logprobs") is not None else [],
        prompt_logprobs=PROMPT_ROWS if "prompt_details" in given else [],
        first_token=11.0,
        finished=Finished(1, FinishReason.LENGTH, usage) if ended else None,
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_goes_on_wherever_it_was(way: str) -> None:
    given, text = WAYS[way]
    asked = prompt(**given)
    new_core = grammar_core if "tools" in given else core
    undisturbed = Reader()
    worker = started(new_core, asked, given)
    undisturbed.read(worker)
    for step in steps(given, text):
        worker.tokens(step, now=11.0)
        undisturbed.read(worker)
    assert undisturbed.said.end is not None
    for heard in range(len(text) + 1):
        for known in sorted({heard, min(heard + 3, len(text)), len(text)}):
            reader = Reader()
            first = started(new_core, asked, given)
            reader.read(first)
            for step in steps(given, text)[:heard]:
                first.tokens(step, now=11.0)
                reader.read(first)
            if reader.ends:
                continue  # it is not asked for again
            second = new_core()
            is_told = asked.prompt_details and not reader.prompts
            heard_of = (reader.produced,)
            again = msgspec.structs.replace(asked, heard=heard_of, prompt_details=is_told)
            second.prompt(again, now=20.0)
            second.resumed(resumed(given, text[:known], ended=known == len(text)), now=20.0)
            reader.read(second)
            for step in steps(given, text)[known:]:
                second.tokens(step, now=21.0)
                reader.read(second)
            assert reader.said == undisturbed.said, (heard, known)
            assert second.requests == 0


def started(new_core: Any, asked: Prompt, given: dict[str, Any]) -> Core:
    worker: Core = new_core()
    worker.prompt(asked, now=10.5)
    if "prompt_details" in given:
        no_tokens = msgspec.structs.replace(resumed(given, "", ended=False), first_token=0.0)
        worker.resumed(no_tokens, now=10.6)
    return worker


def test_what_is_submitted_again_says_so_and_for_which_choices() -> None:
    worker = core()
    worker.still_open(StillOpen(0, 0, [7, 9]))
    worker.prompt(prompt(7, choices=3, heard=(5, GONE, 0)), now=20.0)
    (_, _, first), (_, _, second) = sent(worker)
    assert first == StillOpen(0, 0, [7, 9])
    assert isinstance(second, Submit)
    assert (second.request_id, second.choices, second.heard) == (7, 3, (5, GONE, 0))
    assert worker.requests == 2


def test_a_refusal_ends_only_what_somebody_waits_for() -> None:
    worker = core()
    worker.prompt(prompt(7, text="", choices=3, heard=(0, GONE, 0)), now=20.0)
    [(_, _, pieces)] = sent(worker)
    assert [end.request_id for end in pieces.ends] == [7, 9]


def test_the_first_token_came_when_it_came() -> None:
    worker = core()
    worker.prompt(prompt(stop=("#",), heard=(0,)), now=20.0)
    worker.resumed(resumed({}, "ab#", ended=False), now=21.0)
    _, (_, _, cancel), (_, _, pieces) = sent(worker)
    assert cancel == Cancel(1, stopped=True)
    assert pieces.ends[0].usage.first_token_seconds == 1.0  # arrived at 10.0
    assert pieces.ends[0].usage.total_seconds == 11.0


def test_what_is_resumed_and_was_cancelled_is_nothing() -> None:
    worker = core()
    worker.resumed(resumed({}, "ab", ended=True), now=21.0)
    assert worker.take_outbox() == []
