"""What the benchmarks' engine says when something goes wrong, and how it reads metrics."""

from array import array
from collections.abc import Iterator

import pytest

from benchmarks.adapters import AdapterKind
from benchmarks.engine import Engine, Metrics, Request
from benchmarks.harness import Scene, room_in_memory, serving, settings_from
from pipeline.metrics import Families

PROMPT = array("i", [5, 6, 7])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = {"device": "cpu", "gpu_threads": 1, "arena_bytes": 1 << 20, "stats_seconds": 0.02}
    kinds = [("one", AdapterKind(rank=4))]
    with serving(Scene(model="tiny", kinds=kinds, settings=settings)) as engine:
        yield engine


def test_replies_know_when_each_token_came(engine: Engine) -> None:
    replies = engine.run([Request(PROMPT, 5), Request(PROMPT, 3, "one")])
    assert [len(reply.times) for reply in replies] == [5, 3]
    for reply in replies:
        assert reply.times == sorted(reply.times)
        assert reply.first_token_seconds > 0


def test_metrics_count_all_that_has_been_done(engine: Engine) -> None:
    before = engine.metrics()
    engine.run([Request(PROMPT, 5)])
    after = engine.metrics()
    assert after.since(before, "scheduler", "loradex_tokens_generated_total") == 5


def test_a_request_that_fails_ends_the_benchmark(engine: Engine) -> None:
    engine.submit(Request(PROMPT, 5, "absent"))
    with pytest.raises(SystemExit, match=r"adapter absent failed: .*no such adapter"):
        engine.finish()


def test_what_comes_for_cancelled_requests_is_ignored(engine: Engine) -> None:
    cancelled = engine.submit(Request(PROMPT, 1000))
    while not cancelled.times:
        engine.receive(1.0)
    engine.cancel_all()
    engine.run([Request(PROMPT, 5)])
    assert cancelled.finished is None


def test_metrics_are_found_by_process_name_and_labels() -> None:
    def families(good: float) -> Families:
        samples = [("x_total", {"end": "good", "to": "b"}, good), ("x_total", {"end": "bad"}, 1.0)]
        return [("x", "help", "counter", samples)]

    before, after = Metrics({"one": families(2.0)}), Metrics({"one": families(7.0)})
    assert after.total("one", "x_total") == 8
    assert after.total("one", "x_total", end="good") == 7
    assert after.total("two", "x_total") is None
    assert after.since(before, "one", "x_total", end="good") == 5
    assert after.since(Metrics({}), "one", "x_total", end="bad") == 1


def test_settings_are_changed_by_texts() -> None:
    assert settings_from({"rows": 3}, ["rows=5", "prefix_cache=false"]).rows == 5
    with pytest.raises(SystemExit, match="expected NAME=VALUE"):
        settings_from({}, ["rows"])


def test_what_has_no_room_in_memory_goes_to_disk() -> None:
    assert str(room_in_memory(1)) == "/dev/shm"
    assert str(room_in_memory(1 << 60)) != "/dev/shm"
