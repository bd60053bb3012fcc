"""Which adapters a metric names, and under what name."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.adapter_labels import OTHER, AdapterLabels, label_of
from frontend.adapter_metrics import AdapterMetrics
from pipeline.messages import AdapterKey, FinishReason, Usage
from pipeline.metrics import REGISTRY


def key(name: str, scope: str = "") -> AdapterKey:
    return AdapterKey("local", name, scope=scope)


def test_a_label_is_source_id_and_revision() -> None:
    assert label_of(AdapterKey("hub", "org/name")) == "hub:org/name"
    assert label_of(AdapterKey("hub", "org/name", "v1")) == "hub:org/name@v1"


def test_a_private_adapter_is_named_by_a_digest_which_is_the_tenants_own() -> None:
    mine, theirs = (label_of(key("secret-plan", scope=scope)) for scope in ("me", "them"))
    assert mine.startswith("local:private-")
    assert "secret" not in mine
    assert mine != theirs


def test_a_long_name_is_a_digest() -> None:
    assert len(label_of(key("x" * 500))) < 40


def test_the_first_ones_have_labels_and_the_rest_share_one() -> None:
    labels = AdapterLabels(2)
    for name in "abc":
        assert labels.use(key(name)) is None
    assert [labels.find(key(name)) for name in "abc"] == ["local:a", "local:b", OTHER]


def test_one_that_is_used_much_more_takes_the_label_of_the_one_used_least() -> None:
    labels = AdapterLabels(2)
    for name in "aaab":
        labels.use(key(name))
    assert [labels.use(key("c")) for _ in range(3)] == [None, None, "local:b"]
    assert [labels.find(key(name)) for name in "abc"] == ["local:a", OTHER, "local:c"]


def test_without_labels_all_share_one() -> None:
    labels = AdapterLabels(0)
    assert labels.use(key("a")) is None
    assert labels.find(key("a")) == OTHER


@given(st.lists(st.sampled_from("abcdefgh")), st.integers(1, 4))
def test_labels_are_bounded_and_whoever_is_used_most_by_far_has_one(uses: str, bound: int) -> None:
    labels = AdapterLabels(bound)
    alive: set[str] = set()
    for name in uses:
        ended = labels.use(key(name))
        if ended is not None:
            alive.remove(ended)
        alive |= {labels.find(key(name))} - {OTHER}
        assert len(alive) <= bound
    assert alive == {labels.find(key(name)) for name in set(uses)} - {OTHER}
    counts = Counter(uses).most_common()
    if counts and (len(counts) == 1 or counts[0][1] > 2 * counts[1][1]):
        assert labels.find(key(counts[0][0])) != OTHER


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"loradex_adapter_{name}", labels)


def test_replies_are_counted_under_their_adapter() -> None:
    counted = AdapterMetrics(100)
    usage = Usage(prompt_tokens=3, completion_tokens=2, first_token_seconds=0.2)
    counted.count(key("counted"), FinishReason.EOS, usage)
    counted.count(key("counted"), FinishReason.ERROR, usage)
    label = "local:counted"
    assert value("requests_total", adapter=label, outcome="answered") == 1
    assert value("requests_total", adapter=label, outcome="failed") == 1
    assert value("tokens_total", adapter=label, kind="prompt") == 3
    assert value("tokens_total", adapter=label, kind="generated") == 2
    assert value("first_token_seconds_sum", adapter=label) == pytest.approx(0.2)


def test_what_only_fails_makes_no_series() -> None:
    AdapterMetrics(100).count(key("made-up"), FinishReason.ERROR, Usage(0, 0))
    assert value("requests_total", adapter="local:made-up", outcome="failed") is None


def test_the_series_of_an_adapter_that_lost_its_label_are_gone() -> None:
    counted = AdapterMetrics(1)
    for name in ("loser", "winner", "winner", "winner"):
        counted.count(key(name), FinishReason.LENGTH, Usage(1, 1))
    assert value("requests_total", adapter="local:loser", outcome="answered") is None
    assert value("tokens_total", adapter="local:loser", kind="prompt") is None
    assert value("requests_total", adapter="local:winner", outcome="answered") == 1
