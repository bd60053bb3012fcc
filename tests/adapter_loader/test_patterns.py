"""Keys of rank_pattern and alpha_pattern match as in PEFT, and cannot hang the process."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapter_loader.patterns import MAX_KEYS, PatternError, first_matches

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
KEYS = [
    "q_proj",
    "proj",
    "_proj",
    "self_attn.q_proj",
    "attn.q_proj",
    "1.self_attn.v_proj",
    "layers.1.mlp.up_proj",
    "^model.layers.0.mlp.up_proj",
    "^mlp.up_proj",
    "model.layers.11.mlp.up_proj$",
    r"layers\.1\.self_attn\.q_proj",
    "self.attn.v.proj",
    "",
    ".",
    ".*",
    ".*up_proj",
    r"layers\.[01]\.mlp\.up_proj",
    r"layers\.(0|11)\.self_attn\.(q|v)_proj",
    r"\d+\.mlp\.\w+",
    "(?:mlp|self_attn).up_proj",
    "up_proj|v_proj",
    r"(\d)\1\.mlp\.up_proj",
]


def as_peft(keys: list[str], name: str) -> str | None:
    key = get_pattern_key(keys, name)
    return key if key in keys else None


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_the_names_that_it_matches_in_peft(key: str) -> None:
    assert first_matches([key], NAMES) == [as_peft([key], name) for name in NAMES]


@given(st.lists(st.sampled_from([key for key in KEYS if not set(key) & set("*+|[(\\")])))
def test_the_first_key_that_matches_wins(keys: list[str]) -> None:
    assert first_matches(keys, NAMES) == [as_peft(keys, name) for name in NAMES]


def test_no_keys_match_nothing_and_no_names_need_no_match() -> None:
    assert first_matches([], NAMES) == [None] * len(NAMES)
    assert first_matches(["(("], []) == []


@pytest.mark.parametrize("key", ["(", "q_proj)", "*", "[", r"\9x\1", "(?i)q_proj", "a{2,1}"])
def test_a_key_that_is_no_pattern_is_refused(key: str) -> None:
    with pytest.raises(PatternError, match="not a pattern"):
        first_matches([key], NAMES)


def test_a_key_that_takes_for_ever_is_given_up() -> None:
    before = time.process_time()
    with pytest.raises(PatternError, match="too long"):
        first_matches([r"(\w+\.?)+!"], ["model.layers.0.self_attn.q_proj" * 2])
    assert time.process_time() - before < 1, "it was matched in this process"


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(PatternError, match=f"{MAX_KEYS} is the most"):
        first_matches([str(index) for index in range(MAX_KEYS + 1)], NAMES)
