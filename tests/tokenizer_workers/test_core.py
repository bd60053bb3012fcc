"""The life of a request in a tokenizer worker, as a list of calls."""

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.logprobs import pack
from pipeline.messages import (
    REQUEST_BITS,
    AdapterKey,
    Alternative,
    Cancel,
    ChatOptions,
    End,
    Failure,
    FailureKind,
    Finished,
    FinishReason,
    Grammar,
    GrammarChecked,
    GrammarKind,
    Logprobs,
    Piece,
    Pieces,
    Pooling,
    PoolingKind,
    Prompt,
    PromptDetails,
    PromptLogprobs,
    Rendered,
    Sampling,
    Shutdown,
    Submit,
    TokenDetail,
    Tokens,
    ToolCallPart,
    Tools,
    Usage,
)
from tokenizer_workers.core import CUT_OFF, Core
from tokenizer_workers.details import Vocabulary
from tokenizer_workers.encode import Encoded
from tokenizer_workers.tool_calls import ToolCallParser
from tokenizer_workers.tool_formats import FORMATS

SPECIAL = 0
SECOND_FRONTEND = 1 << REQUEST_BITS
VOCABULARY = Vocabulary(lambda token_id: chr(token_id).encode(), frozenset({SPECIAL}))
USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, total_seconds=9.0)


class Letters:
    """A decoder whose tokens are the code points of letters; upper case waits for the next one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + (chr(token_id) if token_id else "")
        self._held = text if text[-1:].isupper() else ""
        return "" if self._held else text

    def finish(self) -> str:
        return self._held


def encode(prompt: Prompt) -> Encoded:
    """One token for each letter."""
    if prompt.token_ids is not None:
        return Encoded(prompt.token_ids, len(prompt.token_ids) // 4, 100)
    if not prompt.text:
        raise RequestError(400, FailureKind.VALIDATION, "nothing to do")
    ids = array("i", map(ord, prompt.text[-(prompt.truncate or 0) :]))
    return Encoded(ids.tobytes(), len(ids), prompt.max_tokens or 100)


def core(worker: int = 0, frontends: int = 1) -> Core:
    return Core(
        worker=worker,
        frontends=frontends,
        encode=encode,
        new_decoder=Letters,
        new_token_decoder=Letters,
        vocabulary=VOCABULARY,
        new_tool_decoder=Letters,
    )


def prompt(request_id: int = 1, text: str = "abc", **given: Any) -> Prompt:
    return Prompt(request_id=request_id, arrived=10.0, text=text, **given)


def started(*prompts: Prompt, frontends: int = 1) -> Core:
    """A core that has sent these to the scheduler."""
    worker = core(frontends=frontends)
    for each in prompts or (prompt(),):
        worker.prompt(each, now=10.5)
    worker.take_outbox()
    return worker


def step(text: str, request_id: int = 1, **given: Any) -> Tokens:
    """The scheduler's message when a request produced these letters."""
    ids = [ord(letter) for letter in text]
    return Tokens(request_ids=[request_id] * len(ids), token_ids=ids, logprobs={}, **given)


def finished(request_id: int = 1, reason: FinishReason = FinishReason.EOS) -> Finished:
    return Finished(request_id, reason, USAGE)


def said(
    request_id: int, text: str, tokens: tuple[TokenDetail, ...] = (), *, produced: int | None = None
) -> Piece:
    """A piece of as many tokens as letters, unless it is said otherwise; the first one."""
    return Piece(request_id, text, tokens, (), len(text) if produced is None else produced)


def sent(worker: Core) -> list[tuple[str, int, Any]]:
    return [(to.process, to.index, to.message) for to in worker.take_outbox()]


def to_frontend(worker: Core) -> Pieces:
    """The one message to the one frontend, where nothing else is sent."""
    [(process, _, pieces)] = sent(worker)
    assert process == "frontend"
    assert isinstance(pieces, Pieces)
    return pieces


def test_a_prompt_is_encoded_and_submitted_with_all_that_it_asks_for() -> None:
    worker = core(worker=3)
    key = AdapterKey("hub", "org/sql")
    worker.prompt(
        prompt(
            7,
            adapter=key,
            adapter_token="secret",
            sampling=Sampling(temperature=0.0),
            max_tokens=5,
            ignore_eos=True,
        ),
        now=10.5,
    )
    submit = Submit(
        request_id=7,
        worker=3,
        arrived=10.0,
        token_ids=array("i", [*b"abc"]).tobytes(),
        max_tokens=5,
        adapter=key,
        adapter_token="secret",
        sampling=Sampling(temperature=0.0),
        ignore_eos=True,
    )
    assert sent(worker) == [("scheduler", 0, submit)]


def test_a_prompt_that_cannot_run_ends_at_once_with_the_reason() -> None:
    worker = core()
    worker.prompt(prompt(text=""), now=10.5)
    failure = Failure(400, FailureKind.VALIDATION, "nothing to do")
    usage = Usage(prompt_tokens=0, completion_tokens=0, total_seconds=0.5)
    end = End(1, FinishReason.ERROR, usage, failure)
    assert to_frontend(worker) == Pieces([], (end,))
    assert worker.requests == 0


def test_the_tokens_of_a_step_become_one_message_to_each_frontend() -> None:
    worker = started(prompt(1), prompt(2), prompt(SECOND_FRONTEND), frontends=2)
    worker.tokens(Tokens([1, 2, SECOND_FRONTEND], [*b"xyz"], {}), now=11.0)
    assert sent(worker) == [
        ("frontend", 0, Pieces([said(1, "x"), said(2, "y")])),
        ("frontend", 1, Pieces([said(SECOND_FRONTEND, "z")])),
    ]


def test_the_text_of_several_steps_travels_as_one_piece() -> None:
    worker = started()
    worker.tokens(step("x"), now=11.0)
    worker.tokens(step("y"), now=11.1)
    assert to_frontend(worker) == Pieces([said(1, "xy")])


def test_a_step_that_completes_no_character_sends_nothing() -> None:
    worker = started()
    worker.tokens(step("X"), now=11.0)
    assert worker.take_outbox() == []


def test_the_end_brings_the_text_that_was_held_back() -> None:
    worker = started()
    worker.tokens(step("aX", finished=(finished(),)), now=11.0)
    end = End(1, FinishReason.EOS, USAGE)
    assert to_frontend(worker) == Pieces([said(1, "aX")], (end,))
    assert worker.requests == 0


def test_an_end_without_a_token_is_passed_on_with_its_failure() -> None:
    worker = started()
    failure = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "no adapter `x`")
    gone = Finished(1, FinishReason.ERROR, USAGE, failure)
    worker.tokens(Tokens([], [], {}, finished=(gone,)), now=11.0)
    assert to_frontend(worker) == Pieces([], (End(1, FinishReason.ERROR, USAGE, failure),))


def test_a_stop_string_ends_the_request_here_and_cancels_it_at_the_scheduler() -> None:
    worker = started(prompt(stop=("##",)))
    worker.tokens(step("ab"), now=11.0)
    worker.tokens(step("#"), now=11.5)
    assert to_frontend(worker) == Pieces([said(1, "ab", produced=3)])

    worker.tokens(step("#"), now=12.0)
    usage = Usage(prompt_tokens=3, completion_tokens=4, first_token_seconds=1.0, total_seconds=2.0)
    assert sent(worker) == [
        ("scheduler", 0, Cancel(1, stopped=True)),
        ("frontend", 0, Pieces([], (End(1, FinishReason.STOP, usage),))),
    ]

    worker.tokens(step("z", finished=(finished(),)), now=12.5)
    assert worker.take_outbox() == []


def test_a_stop_string_in_the_last_token_is_the_reason_of_the_end() -> None:
    worker = started(prompt(stop=("##",), keep_stop=True))
    last = step("a##", finished=(finished(reason=FinishReason.LENGTH),))
    worker.tokens(last, now=11.0)
    cancel, pieces = sent(worker)
    assert cancel == ("scheduler", 0, Cancel(1, stopped=True))
    assert pieces[2].pieces == [said(1, "a##")]
    assert [end.reason for end in pieces[2].ends] == [FinishReason.STOP]


def test_a_stop_string_in_what_the_decoder_held_back_counts_too() -> None:
    worker = started(prompt(stop=("X",)))
    worker.tokens(step("aX", finished=(finished(reason=FinishReason.LENGTH),)), now=11.0)
    end = End(1, FinishReason.STOP, USAGE)
    assert to_frontend(worker) == Pieces([said(1, "a", produced=2)], (end,))


def test_the_beginning_of_a_stop_string_is_shown_when_the_request_ends() -> None:
    worker = started(prompt(stop=("##",)))
    worker.tokens(step("a#", finished=(finished(),)), now=11.0)
    end = End(1, FinishReason.EOS, USAGE)
    assert to_frontend(worker) == Pieces([said(1, "a#")], (end,))


def test_token_details_come_with_each_token_even_where_no_text_is_ready() -> None:
    worker = started(prompt(token_details=True, stop=("ab",)))
    rows = {at: pack(logprob, []) for at, logprob in enumerate((-0.5, -1.5))}
    worker.tokens(Tokens([1, 1], [ord("a"), SPECIAL], rows), now=11.0)
    details = (
        TokenDetail(ord("a"), "a", -0.5, False),
        TokenDetail(SPECIAL, "", -1.5, True, data=b"\0"),
    )
    assert to_frontend(worker) == Pieces([said(1, "", details, produced=2)])


def test_only_the_request_that_asked_gets_token_details() -> None:
    worker = started(prompt(1, token_details=True), prompt(2))
    worker.tokens(Tokens([1, 2], [*b"xy"], {}), now=11.0)
    [first, second] = to_frontend(worker).pieces
    assert first == said(1, "x", (TokenDetail(ord("x"), "x", None, False),))
    assert second == said(2, "y")


def test_a_cancelled_request_is_cancelled_at_the_scheduler_and_never_heard_of_again() -> None:
    worker = started(prompt(token_details=True))
    worker.tokens(step("a"), now=11.0)
    worker.cancel(1)
    worker.tokens(step("x", finished=(finished(),)), now=11.0)
    assert sent(worker) == [("scheduler", 0, Cancel(1))]
    assert worker.requests == 0


def test_what_is_not_known_here_may_be_known_to_the_scheduler() -> None:
    worker = started()
    worker.tokens(step("", finished=(finished(),)), now=11.0)
    worker.take_outbox()
    worker.cancel(1)
    assert sent(worker) == [("scheduler", 0, Cancel(1))]


def test_the_scheduler_is_told_to_shut_down_when_the_last_frontend_has_gone() -> None:
    worker = started(prompt(1), prompt(SECOND_FRONTEND), frontends=2)
    worker.shutdown(1)
    assert sent(worker) == [("scheduler", 0, Cancel(SECOND_FRONTEND))]
    assert worker.frontends == [0]

    worker.shutdown(0)
    assert sent(worker) == [
        ("scheduler", 0, Cancel(1)),
        ("scheduler", 0, Shutdown("tokenizer_workers", 0)),
    ]
    assert worker.frontends == []


events = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("finish"), st.integers(0, 5)),
        st.tuples(st.just("tokens"), st.text(alphabet="ab#X", max_size=5)),
        st.tuples(st.just("send"), st.just(0)),
    )
)


@given(events=events)
def test_each_prompt_has_one_end_unless_it_is_cancelled(events: list[tuple[str, Any]]) -> None:
    worker = core()
    prompts = 0
    open_at_scheduler: set[int] = set()
    cancelled: set[int] = set()
    ended: list[int] = []

    def settle() -> None:
        for _, _, message in sent(worker):
            match message:
                case Submit():
                    open_at_scheduler.add(message.request_id)
                case Cancel():
                    open_at_scheduler.discard(message.request_id)
                case Pieces():
                    ended.extend(end.request_id for end in message.ends)

    for event, given_value in events:
        match event:
            case "prompt":
                text = "abc" if given_value else ""
                worker.prompt(prompt(prompts, text, stop=("##",) * (given_value % 2)), now=11.0)
                prompts += 1
            case "cancel":
                if given_value < prompts and given_value not in ended:
                    cancelled.add(given_value)
                worker.cancel(given_value)
            case "finish":
                if given_value in open_at_scheduler:
                    open_at_scheduler.remove(given_value)
                    worker.tokens(step("", finished=(finished(given_value),)), now=11.0)
            case "tokens":
                for request_id in sorted(open_at_scheduler):
                    worker.tokens(step(given_value, request_id), now=11.0)
            case "send":
                settle()
    settle()
    for request_id in sorted(open_at_scheduler):
        worker.tokens(step("", finished=(finished(request_id),)), now=12.0)
    settle()

    assert worker.requests == 0
    assert len(ended) == len(set(ended))
    assert set(range(prompts)) - cancelled <= set(ended)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_completion_tokens_run_up_to_the_one_that_completed_the_stop_string(count: int) -> None:
    worker = started(prompt(stop=("#",)))
    worker.tokens(step("a" * (count - 1) + "#aaa"), now=11.0)
    _, (_, _, pieces) = sent(worker)
    assert pieces.ends[0].usage.completion_tokens == count


def test_the_choices_of_a_prompt_are_requests_of_their_own_and_one_submit() -> None:
    worker = core()
    worker.prompt(prompt(7, choices=3), now=10.5)
    [(_, _, submit)] = sent(worker)
    assert (submit.request_id, submit.choices) == (7, 3)
    assert worker.requests == 3
    worker.tokens(Tokens([7, 8, 9], [*b"xyz"], {}), now=11.0)
    assert to_frontend(worker) == Pieces([said(7, "x"), said(8, "y"), said(9, "z")])
    worker.cancel(8)
    assert sent(worker) == [("scheduler", 0, Cancel(8))]


def test_a_prompt_that_cannot_run_ends_all_of_its_choices() -> None:
    worker = core()
    worker.prompt(prompt(7, text="", choices=2), now=10.5)
    assert [end.request_id for end in to_frontend(worker).ends] == [7, 8]


def test_what_a_request_wants_of_the_scheduler_is_passed_on() -> None:
    worker = core()
    wanted = Logprobs(2, prompt_top=1)
    worker.prompt(prompt(logprobs=wanted, stop_token_ids=(5,)), now=10.5)
    [(_, _, submit)] = sent(worker)
    assert submit.logprobs == wanted
    assert submit.stop_token_ids == (5,)


def test_a_prompts_details_are_told_when_the_last_of_them_has_come() -> None:
    wanted = Logprobs(prompt_top=1)
    worker = started(prompt(logprobs=wanted, prompt_details=True))
    worker.prompt_logprobs(PromptLogprobs(1, [pack(-1.0, [(ord("x"), -0.5)])]))
    assert sent(worker) == []
    worker.prompt_logprobs(PromptLogprobs(1, [pack(-2.0, [(ord("c"), -2.0)])]))
    worker.tokens(step("y"), now=11.0)
    (_, _, details), (_, _, pieces) = sent(worker)
    expected = (
        TokenDetail(ord("a"), "a", None, False),
        TokenDetail(ord("b"), "b", -1.0, False, (Alternative(ord("x"), "x", -0.5),)),
        TokenDetail(ord("c"), "c", -2.0, False, (Alternative(ord("c"), "c", -2.0),)),
    )
    assert details == PromptDetails(1, "abc", expected)
    assert pieces == Pieces([said(1, "y")])


def test_a_prompt_whose_text_alone_is_wanted_is_told_at_once() -> None:
    worker = core()
    ids = array("i", [*b"xy"]).tobytes()
    worker.prompt(prompt(1, "xy", prompt_details=True), now=10.5)
    worker.prompt(
        Prompt(request_id=2, arrived=1.0, token_ids=ids, text=None, prompt_details=True), now=10.5
    )
    worker.prompt(prompt(3, "vwxy", prompt_details=True, truncate=2), now=10.5)
    told = [message for _, _, message in sent(worker) if isinstance(message, PromptDetails)]
    assert told == [PromptDetails(1, "xy"), PromptDetails(2, "xy"), PromptDetails(3, "xy")]


def test_the_details_of_a_cancelled_prompt_are_not_told() -> None:
    worker = core()
    worker.prompt(prompt(1, prompt_details=True), now=10.5)
    worker.cancel(1)
    assert [process for process, _, _ in sent(worker)] == ["scheduler", "scheduler"]
    worker.prompt_logprobs(PromptLogprobs(1, [pack(-1.0, [])]))
    assert sent(worker) == []


def own_chat(request_id: int = 1, **given: Any) -> Prompt:
    """A chat that brings its template."""
    return msgspec.structs.replace(
        prompt(request_id, **given),
        text=None,
        chat=[{"role": "user", "content": "Hi"}],
        chat_options=ChatOptions(template="{{ 1 }}", add_special_tokens=True),
    )


def test_a_chat_with_a_template_of_its_own_waits_and_the_others_pass() -> None:
    worker = core()
    worker.prompt(own_chat(1), now=10.5)
    worker.prompt(prompt(2), now=10.5)
    assert [one.prompt.request_id for one in worker.take_renderings()] == [1]
    assert worker.take_renderings() == []
    assert worker.renders(1)
    assert worker.requests == 2
    assert [submit.request_id for submit in submits(worker)] == [2]

    given = worker.rendered(Rendered(1, "abcd"), now=11.0)
    assert given == own_chat(1)
    (submit,) = submits(worker)
    assert len(submit.token_ids) == 4 * 4
    assert not worker.renders(1)


def test_a_template_that_fails_ends_its_request() -> None:
    worker = core()
    worker.prompt(own_chat(1), now=10.5)
    failed = Failure(422, FailureKind.TEMPLATE, "too slow (line 3)")
    worker.rendered(Rendered(1, "", failed), now=12.0)
    (to,) = worker.take_outbox()
    assert isinstance(to.message, Pieces)
    (ended,) = to.message.ends
    assert ended.failure == failed
    assert ended.usage.total_seconds == 2.0
    assert worker.requests == 0


def test_what_is_cancelled_while_its_template_runs_is_forgotten() -> None:
    worker = core(frontends=2)
    worker.prompt(own_chat(1), now=10.5)
    worker.prompt(own_chat(SECOND_FRONTEND | 2), now=10.5)
    worker.cancel(1)
    worker.shutdown(1)
    assert worker.take_renderings() == []
    assert worker.rendered(Rendered(1, "abc"), now=11.0) is None
    assert worker.rendered(Rendered(SECOND_FRONTEND | 2, "abc"), now=11.0) is None
    assert sent(worker) == [("scheduler", 0, Cancel(1))]


def submits(worker: Core) -> list[Submit]:
    return [to.message for to in worker.take_outbox() if isinstance(to.message, Submit)]


def grammatical(prompt: Prompt) -> Encoded:
    """The grammar is the name of a tool that may be called, or what the prompt says."""
    encoded = encode(prompt)
    if prompt.tools is not None:
        parallel = prompt.tools.parallel
        return msgspec.structs.replace(
            encoded,
            new_parser=lambda: ToolCallParser(FORMATS["hermes"], names=["add"], parallel=parallel),
        )
    assert prompt.grammar is not None
    return msgspec.structs.replace(encoded, grammar=prompt.grammar.text)


def grammar_core(frontends: int = 1) -> Core:
    return Core(
        worker=0,
        frontends=frontends,
        encode=grammatical,
        new_decoder=Letters,
        new_token_decoder=Letters,
        vocabulary=VOCABULARY,
        new_tool_decoder=Letters,
    )


def constrained(request_id: int = 1, grammar: str = "g") -> Prompt:
    return prompt(request_id, grammar=Grammar(GrammarKind.REGEX, grammar))


def test_a_prompt_waits_until_its_grammar_is_known_to_be_good() -> None:
    worker = grammar_core()
    worker.prompt(constrained(1), now=1)
    worker.prompt(constrained(2), now=1)
    assert worker.take_checks() == ["g"]
    assert submits(worker) == []
    assert worker.requests == 2
    worker.grammar_checked(GrammarChecked("g"), now=2)
    assert [(one.request_id, one.grammar) for one in submits(worker)] == [(1, "g"), (2, "g")]
    worker.prompt(constrained(3), now=3)
    assert [one.request_id for one in submits(worker)] == [3]
    assert worker.take_checks() == []


def test_all_choices_of_a_prompt_wait_for_its_grammar_and_end_with_it() -> None:
    worker = grammar_core()
    worker.prompt(msgspec.structs.replace(constrained(1, "good"), choices=2), now=1)
    worker.prompt(msgspec.structs.replace(constrained(5, "bad"), choices=2), now=1)
    assert worker.take_outbox() == []
    worker.grammar_checked(GrammarChecked("good"), now=2)
    [submit] = submits(worker)
    assert (submit.request_id, submit.choices, submit.grammar) == (1, 2, "good")
    worker.grammar_checked(GrammarChecked("bad", "no such thing"), now=2)
    assert [end.request_id for end in to_frontend(worker).ends] == [5, 6]
    assert worker.requests == 2


def test_a_grammar_that_cannot_be_had_ends_its_own_requests() -> None:
    worker = grammar_core()
    worker.prompt(constrained(1, "bad"), now=11)
    worker.prompt(constrained(2, "good"), now=11)
    assert worker.take_checks() == ["bad", "good"]
    worker.grammar_checked(GrammarChecked("bad", "no such thing"), now=12)
    worker.grammar_checked(GrammarChecked("good"), now=12)
    worker.prompt(constrained(3, "bad"), now=13)
    (to_scheduler, pieces) = worker.take_outbox()
    assert isinstance(to_scheduler.message, Submit)
    assert to_scheduler.message.request_id == 2
    assert isinstance(pieces.message, Pieces)
    assert [end.request_id for end in pieces.message.ends] == [1, 3]
    assert {end.failure for end in pieces.message.ends} == {
        Failure(422, FailureKind.GRAMMAR, "no such thing")
    }


def test_a_prompt_that_is_cancelled_while_it_waits_is_not_submitted() -> None:
    worker = grammar_core(frontends=2)
    worker.prompt(constrained(1), now=1)
    worker.prompt(constrained(SECOND_FRONTEND + 2), now=1)
    worker.cancel(1)
    worker.shutdown(1)
    worker.grammar_checked(GrammarChecked("g"), now=2)
    assert submits(worker) == []
    assert worker.requests == 0


def tool_reply(text: str, **given: Any) -> list[Pieces]:
    """What a reply to a chat with tools becomes, a letter at a time."""
    worker = grammar_core()
    worker.prompt(prompt(tools=Tools([{"name": "add"}], **given)), now=1)
    worker.take_outbox()
    messages = []
    for letter in text:
        worker.tokens(Tokens([1], [ord(letter)], {}), now=2)
        messages += [to.message for to in worker.take_outbox()]
    if worker.requests:
        end = Finished(1, FinishReason.EOS, USAGE)
        worker.tokens(Tokens([], [], {}, (end,)), now=3)
        messages += [to.message for to in worker.take_outbox()]
    return [message for message in messages if isinstance(message, Pieces)]


def test_a_call_comes_as_parts_and_text_as_text() -> None:
    messages = tool_reply('so <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    pieces = [piece for message in messages for piece in message.pieces]
    assert "".join(piece.text for piece in pieces) == "so "
    parts = [part for piece in pieces for part in piece.tool_calls]
    assert parts[0] == ToolCallPart(0, name="add")
    assert "".join(part.arguments for part in parts) == '{"a": 1}'
    assert messages[-1].ends == (End(1, FinishReason.EOS, USAGE),)


def test_what_is_held_back_comes_with_the_end() -> None:
    messages = tool_reply("a <tool_call> b <tool")
    text = "".join(piece.text for message in messages for piece in message.pieces)
    assert text == "a <tool_call> b <tool"
    assert not any(piece.tool_calls for message in messages for piece in message.pieces)


def test_the_one_call_that_is_allowed_ends_the_reply() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}'
    messages = tool_reply(call + "</tool_call> and more", parallel=False)
    (end,) = messages[-1].ends
    assert end.reason is FinishReason.STOP
    assert end.usage.completion_tokens == len(call)


def test_an_embedding_passes_as_it_is_with_no_text() -> None:
    worker = core()
    worker.prompt(prompt(text="abc", max_tokens=1, pooling=Pooling(PoolingKind.MEAN)), now=10.5)
    [(_, _, submitted)] = sent(worker)
    assert (submitted.pooling, submitted.max_tokens) == (Pooling(PoolingKind.MEAN), 1)
    embedded = Finished(1, FinishReason.EMBEDDED, USAGE, embedding=b"1234")
    worker.tokens(Tokens([], [], {}, finished=(embedded,)), now=11.0)
    pieces = to_frontend(worker)
    assert pieces == Pieces([], (End(1, FinishReason.EMBEDDED, USAGE, embedding=b"1234"),))
    assert worker.requests == 0


# --- after a death --------------------------------------------------------------------------------


def test_what_was_submitted_to_a_dead_scheduler_ends_with_an_error() -> None:
    worker = started(prompt(1), prompt(2, choices=2))
    worker.tokens(step("hi", 1), now=11.0)
    worker.prompt(prompt(9), now=11.0)  # not sent yet, so it would not be known either
    worker.scheduler_started(now=12.0)
    pieces = to_frontend(worker)
    assert [piece.text for piece in pieces.pieces] == ["hi"]
    assert [(end.request_id, end.reason) for end in pieces.ends] == [
        (request_id, FinishReason.ERROR) for request_id in (1, 2, 3, 9)
    ]
    assert all(end.failure == CUT_OFF for end in pieces.ends)
    assert worker.requests == 0
    worker.tokens(step("late", 1), now=13.0)
    assert sent(worker) == []


def test_what_another_frontend_has_asked_for_before_it_died_is_cancelled() -> None:
    worker = started(prompt(1), prompt(SECOND_FRONTEND), frontends=2)
    worker.tokens(step("said to nobody", SECOND_FRONTEND), now=11.0)
    worker.frontend_started(1)
    assert sent(worker) == [("scheduler", 0, Cancel(SECOND_FRONTEND))]
    assert worker.requests == 1
    worker.prompt(prompt(SECOND_FRONTEND + 1), now=12.0)
    [(process, _, submit)] = sent(worker)
    assert (process, submit.request_id) == ("scheduler", SECOND_FRONTEND + 1)
