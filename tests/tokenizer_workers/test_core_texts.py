"""A request with an adapter that ships its own template or tokenizer, as a list of calls."""

from array import array
from typing import Any

import pytest

from pipeline.errors import RequestError
from pipeline.messages import (
    REQUEST_BITS,
    AdapterKey,
    AdapterTexts,
    Cancel,
    ChatOptions,
    FailureKind,
    Pieces,
    Prompt,
    Rendered,
    Submit,
)
from tests.tokenizer_workers import test_core
from tests.tokenizer_workers.test_core import VOCABULARY, Letters, encode
from tokenizer_workers.core import Core
from tokenizer_workers.known_texts import KnownTexts
from tokenizer_workers.own_texts import NOTHING, OwnTexts

A = AdapterKey("local", "a")
CHAT: Any = [{"role": "user", "content": "Hi"}]
OWN = OwnTexts(template="{{ own }}", special_tokens={"bos_token": "<own>"}, eos=7)


def core(own: OwnTexts = NOTHING) -> Core:
    """A core whose adapters all ship this."""
    return Core(
        worker=0,
        frontends=2,
        encode=encode,
        new_decoder=Letters,
        new_token_decoder=Letters,
        vocabulary=VOCABULARY,
        new_tool_decoder=Letters,
        texts=KnownTexts(
            worker=0,
            read=lambda files: own,
            base_tokenizer="base",
            revalidate_seconds=60,
            wait_seconds=5,
        ),
    )


def prompt(request_id: int = 1, **given: Any) -> Prompt:
    given = {"text": "abc", "adapter": A, **given}
    return Prompt(request_id=request_id, arrived=10.0, **given)


def chat(request_id: int = 1, **given: Any) -> Prompt:
    return prompt(request_id, **{"text": None, "chat": CHAT, **given})


def told(worker: Core, now: float = 11.0) -> None:
    """The loader answers all that was asked, and the worker goes on."""
    for question in worker.take_questions():
        worker.texts_told(AdapterTexts(question.question_id, question.adapter, "1", {}), now)
    while worker.is_ready:
        worker.go_on(now)


def sent(worker: Core) -> list[Any]:
    return [to.message for to in worker.take_outbox()]


def test_a_prompt_waits_for_its_adapters_texts_and_the_base_models_pass() -> None:
    worker = core()
    worker.prompt(prompt(1), now=10.0)
    worker.prompt(prompt(2, adapter=None), now=10.0)
    assert [submit.request_id for submit in sent(worker)] == [2]
    assert (worker.waits(1), worker.waits(2), worker.requests) == (True, False, 2)
    told(worker)
    (submit,) = sent(worker)
    assert isinstance(submit, Submit)
    assert (submit.request_id, submit.adapter, submit.stop_token_ids) == (1, A, ())
    assert not worker.waits(1)

    worker.prompt(prompt(3), now=12.0)
    assert [submit.request_id for submit in sent(worker)] == [3]


def test_a_chat_is_rendered_with_the_adapters_template_and_its_variables() -> None:
    worker = core(OWN)
    worker.prompt(chat(), now=10.0)
    assert worker.take_renderings() == []
    told(worker)
    (one,) = worker.take_renderings()
    assert (one.prompt.request_id, one.template) == (1, OWN.template)
    assert one.special_tokens == {"bos_token": "<own>"}
    assert worker.waits(1)
    worker.rendered(Rendered(1, "abcd"), now=12.0)
    (submit,) = sent(worker)
    assert array("i", submit.token_ids).tolist() == list(map(ord, "abcd"))
    assert worker.take_questions() == []


def test_a_template_of_the_request_wins() -> None:
    worker = core(OWN)
    worker.prompt(chat(chat_options=ChatOptions(template="{{ asked }}")), now=10.0)
    told(worker)
    (one,) = worker.take_renderings()
    assert one.template == "{{ asked }}"
    assert one.special_tokens == {"bos_token": "<own>"}, "of the adapter, all the same"


def test_without_a_template_of_its_own_a_chat_has_the_base_models() -> None:
    worker = core(OwnTexts(eos=7))
    worker.prompt(chat(text="as the encoder here renders it"), now=10.0)
    told(worker)
    assert worker.take_renderings() == []
    assert len(sent(worker)) == 1


def test_the_adapters_end_token_ends_its_replies_unless_no_token_does() -> None:
    worker = core(OWN)
    worker.prompt(prompt(1, stop_token_ids=(3,)), now=10.0)
    worker.prompt(prompt(2, ignore_eos=True), now=10.0)
    told(worker)
    assert [one.stop_token_ids for one in sent(worker)] == [(3, 7), ()]


@pytest.mark.parametrize("what", [prompt, chat])
def test_an_adapter_whose_tokenizer_disagrees_serves_nobody(what: Any) -> None:
    worker = core(OwnTexts(problem="its tokenizer.json disagrees"))
    worker.prompt(what(choices=2), now=10.0)
    told(worker)
    (pieces,) = sent(worker)
    assert isinstance(pieces, Pieces)
    assert [one.request_id for one in pieces.ends] == [1, 2]
    failure = pieces.ends[0].failure
    assert failure is not None
    assert (failure.status, failure.kind) == (422, FailureKind.ADAPTER_INVALID)
    assert failure.message == "adapter a: its tokenizer.json disagrees"
    assert worker.requests == 0


def test_who_is_cancelled_while_it_waits_is_not_submitted() -> None:
    worker = core()
    for request_id in (1, 2, 1 << REQUEST_BITS):
        worker.prompt(prompt(request_id), now=10.0)
    worker.cancel(1)
    for question in worker.take_questions():
        worker.texts_told(AdapterTexts(question.question_id, A, "1", {}), 11.0)
    worker.cancel(2)
    worker.shutdown(1)
    assert not worker.is_ready
    assert sent(worker) == [Cancel(1), Cancel(2)]  # which a predecessor may have submitted
    assert worker.requests == 0


def test_a_loader_that_says_nothing_costs_its_prompts_a_sentence() -> None:
    worker = core()
    worker.prompt(prompt(), now=10.0)
    worker.expire(14.9)
    assert not worker.is_ready
    worker.expire(15.0)
    worker.go_on(15.0)
    (pieces,) = sent(worker)
    assert pieces.ends[0].failure.message == "adapter a: its files were not read within 5 seconds"


def test_where_adapters_texts_are_not_looked_at_nobody_waits() -> None:
    worker = test_core.core()
    worker.prompt(prompt(), now=10.0)
    assert len(sent(worker)) == 1
    assert (worker.take_questions(), worker.take_comparisons()) == ([], [])


def test_an_error_of_the_prompt_is_told_after_the_texts() -> None:
    worker = core()
    worker.prompt(prompt(text=""), now=10.0)
    told(worker)
    (pieces,) = sent(worker)
    with pytest.raises(RequestError, match="nothing to do"):
        encode(prompt(text=""))
    assert pieces.ends[0].failure.message == "nothing to do"
