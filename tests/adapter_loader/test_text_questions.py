"""Who asks for an adapter's files for tokenizers, and what each is told, as a list of calls."""

from typing import Any

from adapter_loader.text_questions import StartTexts, TextQuestions
from adapter_loader.texts import TOKENIZER_FILE, Texts, texts_of
from pipeline.messages import AdapterKey, AdapterTexts, AskTexts, Failure, FailureKind, ForgetTexts

X = AdapterKey("hub", "x", scope="of a tenant")
LOCAL = AdapterKey("local", "x")
TEXTS = texts_of("1", {TOKENIZER_FILE: b"{}", "chat_template.jinja": b"hi"})
GONE = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "it is gone")


def questions() -> TextQuestions:
    return TextQuestions(workers=2, remember_seconds=10)


def ask(question_id: int = 1, worker: int = 0, adapter: AdapterKey = X, **given: Any) -> AskTexts:
    return AskTexts(question_id, worker, adapter, "secret", **given)


def start(core: TextQuestions) -> StartTexts:
    (action,) = core.take_actions()
    return action


def told(core: TextQuestions) -> list[tuple[int, AdapterTexts | ForgetTexts]]:
    return [(to.worker, to.message) for to in core.take_outbox()]


def test_those_who_ask_at_once_wait_for_one_reading_and_each_is_told() -> None:
    core = questions()
    core.ask(ask(1, 0), now=0)
    core.ask(ask(7, 1), now=1)
    core.ask(ask(7, 1), now=2)  # again: its answer may have been lost
    action = start(core)
    assert action == StartTexts(0, X, "secret", "")
    assert "secret" not in repr(action)
    core.fetched(action.number, TEXTS)
    files = dict(TEXTS.files)
    assert told(core) == [
        (0, AdapterTexts(1, X, "1", files, TEXTS.tokenizer)),
        (1, AdapterTexts(7, X, "1", files, TEXTS.tokenizer)),
    ]
    core.ask(ask(8, 1), now=3)
    assert start(core).number == 1


def test_a_tokenizer_that_a_worker_knows_is_not_sent_to_it() -> None:
    core = questions()
    core.ask(ask(1, 0, known_tokenizers=("other", TEXTS.tokenizer)), now=0)
    core.ask(ask(1, 1), now=0)
    core.fetched(start(core).number, TEXTS)
    (_, first), (_, second) = told(core)
    assert isinstance(first, AdapterTexts)
    assert isinstance(second, AdapterTexts)
    assert first.files == {"chat_template.jinja": b"hi"}
    assert second.files == TEXTS.files
    assert first.tokenizer == second.tokenizer != ""


def test_a_version_that_is_known_is_read_for_those_alone_who_know_it() -> None:
    core = questions()
    core.ask(ask(1, 0, known="1"), now=0)
    core.ask(ask(1, 1), now=0)
    knows, does_not = core.take_actions()
    assert (knows.known, does_not.known) == ("1", "")
    core.fetched(knows.number, None)
    assert told(core) == [(0, AdapterTexts(1, X, "1"))]
    core.fetched(does_not.number, Texts("1", {}))
    assert told(core) == [(1, AdapterTexts(1, X, "1", {}))]


def test_a_remote_failure_is_remembered_for_a_while_and_for_its_tenant_alone() -> None:
    core = questions()
    core.ask(ask(), now=0)
    core.failed(start(core).number, GONE, now=1)
    assert told(core) == [(0, AdapterTexts(1, X, failure=GONE))]
    core.ask(ask(2), now=2)
    assert told(core) == [(0, AdapterTexts(2, X, failure=GONE))]
    core.ask(ask(3, adapter=AdapterKey("hub", "x", scope="of another")), now=2)
    core.ask(ask(4), now=11)
    assert [action.key.scope for action in core.take_actions()] == ["of another", "of a tenant"]


def test_a_local_failure_is_not_remembered() -> None:
    core = questions()
    core.ask(ask(adapter=LOCAL), now=0)
    core.failed(start(core).number, GONE, now=1)
    core.ask(ask(2, adapter=LOCAL), now=1)
    assert start(core).key == LOCAL


def test_what_is_to_be_forgotten_is_told_to_all_and_read_anew() -> None:
    core = questions()
    core.ask(ask(1), now=0)
    old = start(core)
    core.forget(X)
    assert told(core) == [(0, ForgetTexts(X)), (1, ForgetTexts(X))]
    core.ask(ask(2), now=1)
    new = start(core)
    assert new.number != old.number
    core.fetched(old.number, TEXTS)
    ((_, first),) = told(core)
    assert isinstance(first, AdapterTexts)
    assert first.question_id == 1
    core.ask(ask(3), now=2)
    assert core.take_actions() == [], "it waits for the new one"
    core.fetched(new.number, TEXTS)
    assert [worker for worker, _ in told(core)] == [0, 0]


def test_forgetting_ends_what_is_remembered_of_a_failure() -> None:
    core = questions()
    core.ask(ask(), now=0)
    core.failed(start(core).number, GONE, now=1)
    core.forget(X)
    core.ask(ask(2), now=2)
    assert start(core).key == X
