"""`merged_adapters` on both families of routes: which adapter it is, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.adapters import AdapterNames, Wanted, scope_of
from frontend.authorization import Authorization
from frontend.lorax import Lorax
from frontend.lorax_replies import LoraxShape
from frontend.merges import MergedAdapters, merged
from frontend.openai import OpenAI
from frontend.parameters import ParameterError
from pipeline.config import SOURCES
from pipeline.messages import MERGED, AdapterKey, MajoritySign, Merge, MergePart, MergeStrategy
from tests.frontend.fakes import BASE, call_of, json_of, make_adapter, refusal_of

TOKEN = "hf_secret"
NAMES = AdapterNames(base_model=BASE, default_source="hub", sources=SOURCES, roots=())
LORAX = Lorax(
    base_model=BASE,
    adapters=NAMES,
    max_stop_sequences=4,
    max_best_of=2,
    compute_type=lambda: "cpu",
)
OPENAI = OpenAI(base_model=BASE, adapters=NAMES, max_stop_sequences=4, max_choices=8)


def find(name: str) -> Wanted | None:
    return NAMES.find(name, source=None, token=TOKEN, parameter="adapter_id")


def key_of(**values: Any) -> AdapterKey:
    return merged(MergedAdapters(**{"ids": ["a/a", "b/b"], **values}), find).key


def merge_of(**values: Any) -> Merge:
    merge = key_of(**values).merge
    assert merge is not None
    return merge


def lorax(**parameters: Any) -> bytes:
    return json.dumps({"inputs": "Hi", "parameters": parameters}).encode()


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Hi"}]
    return json.dumps({"model": "", "messages": messages, **fields}).encode()


def test_all_that_is_said_is_in_the_key() -> None:
    scope = scope_of(TOKEN)
    key = key_of(
        ids=["a/a", "b/b@v1"],
        weights=[0.5, -1],
        merge_strategy="DARE_ties",
        density=0.25,
        majority_sign_method="frequency",
        seed=7,
    )
    assert (key.source, key.scope) == (MERGED, scope)
    assert key.merge == Merge(
        (
            MergePart(AdapterKey("hub", "a/a", "", scope), 0.5),
            MergePart(AdapterKey("hub", "b/b", "v1", scope), -1.0),
        ),
        MergeStrategy.DARE_TIES,
        0.25,
        MajoritySign.FREQUENCY,
        7,
    )


def test_it_is_linear_with_weights_of_one_unless_it_says_otherwise() -> None:
    merge = merge_of()
    assert merge.strategy == MergeStrategy.LINEAR
    assert [part.weight for part in merge.parts] == [1, 1]


def test_what_a_strategy_does_not_use_tells_no_merges_apart() -> None:
    unused = key_of(density=0.5, seed=9, majority_sign_method="frequency")
    assert unused == key_of() == key_of(merge_strategy="linear", density=0)
    ties = key_of(merge_strategy="ties", density=0.5)
    assert ties == key_of(merge_strategy="ties", density=0.5, seed=9)


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": ["b/b", "a/a"]},
        {"ids": ["a/a@v2", "b/b"]},
        {"weights": [1, 0.9999999]},
        {"seed": 1},
        {"density": 0.49999999},
        {"majority_sign_method": "frequency"},
        {"merge_strategy": "ties"},
    ],
)
def test_another_merge_has_another_key(changes: dict[str, Any]) -> None:
    values = {"merge_strategy": "dare_ties", "density": 0.5}
    assert key_of(**values) != key_of(**{**values, **changes})


def test_another_token_makes_another_adapter() -> None:
    def find_without(name: str) -> Wanted | None:
        return NAMES.find(name, source=None, token=None, parameter="adapter_id")

    public = merged(MergedAdapters(ids=["a/a"]), find_without)
    private = merged(MergedAdapters(ids=["a/a"]), find)
    assert (public.token, private.token) == (None, TOKEN)
    assert public.key.scope != private.key.scope
    assert TOKEN not in repr(private.key)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"merge_strategy": "magnitude_prune"}, "merge_strategy", "one of linear, cat, ties"),
    ({"majority_sign_method": "most"}, "majority_sign_method", "one of total, frequency"),
    ({"ids": []}, "merged_adapters", "at least one adapter ID"),
    ({"ids": ["a/a"] * 65}, "ids", "at most 64"),
    ({"ids": ["a/a", ""]}, "ids", "base model"),
    ({"ids": ["a/a", BASE]}, "ids", "base model"),
    ({"weights": [1]}, "merged_adapters", "must match number of adapter weights"),
    ({"weights": []}, "merged_adapters", "must match number of adapter weights"),
    ({"merge_strategy": "ties"}, "density", "must be given for ties"),
    ({"merge_strategy": "ties", "density": 0}, "density", "> 0.0 and <= 1.0"),
    ({"merge_strategy": "dare_linear", "density": 1.5}, "density", "> 0.0 and <= 1.0"),
    ({"merge_strategy": "linear", "density": -0.1}, "density", "> 0.0 and <= 1.0"),
]


@pytest.mark.parametrize(("changes", "field", "sentence"), WRONG)
def test_what_cannot_be_merged_is_a_422_in_both_shapes(
    changes: dict[str, Any], field: str, sentence: str
) -> None:
    values = {"ids": ["a/a", "b/b"], **changes}
    refusal = refusal_of(LORAX.generate(lorax(merged_adapters=values), None))
    assert refusal.status == 422
    assert sentence in json_of(refusal)["error"]
    refusal = refusal_of(OPENAI.chat(chat(merged_adapters=values), None))
    assert refusal.status == 422
    error = json_of(refusal)["error"]
    assert error["type"] == "invalid_request_error"
    assert sentence in error["message"]
    assert field in error["param"]


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_weights_and_densities_that_are_not_finite_are_refused(value: float) -> None:
    for changes in ({"weights": [1, value]}, {"density": value, "merge_strategy": "ties"}):
        with pytest.raises(ParameterError):
            key_of(**changes)


@pytest.mark.parametrize(
    "wrong", [{}, {"ids": "a"}, {"ids": ["a/a"], "svd_rank": 3}, {"ids": ["a/a"], "seed": -1}]
)
def test_a_wrong_shape_is_refused(wrong: dict[str, Any]) -> None:
    assert refusal_of(LORAX.generate(lorax(merged_adapters=wrong), None)).status == 422
    assert refusal_of(OPENAI.chat(chat(merged_adapters=wrong), None)).status == 400


def test_sources_are_not_mixed(tmp_path: Path) -> None:
    make_adapter(tmp_path, "mine")
    names = AdapterNames(base_model=BASE, default_source="auto", sources=SOURCES, roots=(tmp_path,))

    def find(name: str) -> Wanted | None:
        return names.find(name, source=None, token=None, parameter="adapter_id")

    with pytest.raises(ParameterError, match="several sources: hub, local"):
        merged(MergedAdapters(ids=["mine", "some/other"]), find)


def test_an_adapter_beside_a_merge_is_refused() -> None:
    values = {"ids": ["a/a"]}
    body = lorax(adapter_id="a/a", merged_adapters=values)
    assert "at most one of" in json_of(refusal_of(LORAX.generate(body, None)))["error"]
    assert refusal_of(OPENAI.chat(chat(model="a/a", merged_adapters=values), None)).status == 400


def test_both_families_of_routes_ask_for_the_same_adapter() -> None:
    values = {"ids": ["a/a", "b/b"], "weights": [0.5, 0.5]}
    bearer = Authorization(adapter_token=TOKEN)
    by_lorax = call_of(LORAX.generate(lorax(merged_adapters=values), bearer)).prompt
    by_openai = call_of(OPENAI.chat(chat(merged_adapters=values), bearer)).prompt
    assert by_lorax.adapter == by_openai.adapter == key_of(weights=[0.5, 0.5])
    assert by_lorax.adapter_token == by_openai.adapter_token == TOKEN


def test_the_headers_of_lorax_name_the_parts() -> None:
    call = call_of(LORAX.generate(lorax(merged_adapters={"ids": ["a/a", "b/b"]}), None))
    assert isinstance(call.shape, LoraxShape)
    headers = dict(call.shape.stream_headers())
    assert headers[b"x-adapter-id"] == b"a/a,b/b"
    assert headers[b"x-adapter-source"] == b"hub"


def test_the_parts_of_what_is_no_merge_are_itself() -> None:
    key = AdapterKey("hub", "a/a")
    assert key.parts == (key,)
    assert [part.id for part in key_of().parts] == ["a/a", "b/b"]
