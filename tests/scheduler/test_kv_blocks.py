"""The block allocator and the prefix cache."""

import random
import weakref
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.kv_blocks import KvBlocks, PageTable

SIZE = 4  # tokens per block


def kv_blocks(blocks: int = 8, *, prefix_cache: bool = True) -> KvBlocks:
    return KvBlocks(blocks=blocks, block_tokens=SIZE, prefix_cache=prefix_cache)


def tokens(*blocks: int, rest: int = 1) -> "array[int]":
    """Full blocks, each of one token repeated, and some tokens more."""
    return array("i", [token for token in blocks for _ in range(SIZE)] + [99] * rest)


def take(kv: KvBlocks, token_ids: "array[int]", *, root: str = "base") -> PageTable:
    table = kv.open(root, token_ids, reserve=0)
    assert table is not None
    return table


def fill(kv: KvBlocks, token_ids: "array[int]", *, root: str = "base") -> PageTable:
    """Take blocks and compute them."""
    table = take(kv, token_ids, root=root)
    kv.remember(table, token_ids, len(token_ids))
    return table


def cached_after(kv: KvBlocks, token_ids: "array[int]", *, root: str = "base") -> int:
    """The cached tokens that a new sequence would find."""
    table = take(kv, token_ids, root=root)
    cached = kv.cached_tokens(table)
    kv.close(table)
    return cached


def test_a_table_has_blocks_for_all_tokens_and_gives_them_back() -> None:
    kv = kv_blocks()
    table = take(kv, tokens(1, 2))
    assert len(table.blocks) == 3
    assert kv.used == 3
    kv.close(table)
    assert kv.used == 0


def test_too_few_blocks_give_no_table_and_take_nothing() -> None:
    kv = kv_blocks(2)
    assert kv.open("base", tokens(1, 2), reserve=0) is None
    assert kv.used == 0


def test_a_reserve_is_left_over() -> None:
    kv = kv_blocks(3)
    assert kv.open("base", tokens(1), reserve=2) is None
    assert kv.open("base", tokens(1), reserve=1) is not None


def test_a_table_grows_until_no_block_is_left() -> None:
    kv = kv_blocks(2)
    table = take(kv, tokens(rest=1))
    assert kv.extend(table) is not None
    assert kv.extend(table) is None
    assert len(set(table.blocks)) == 2


def test_an_equal_prefix_shares_its_full_blocks() -> None:
    kv = kv_blocks()
    first = fill(kv, tokens(1, 2, rest=3))
    second = take(kv, tokens(1, 2, 3))
    assert second.blocks[:2] == first.blocks[:2]
    assert kv.cached_tokens(second) == 2 * SIZE
    assert kv.used == 5


def test_a_prefix_is_found_after_its_sequence_has_gone() -> None:
    kv = kv_blocks()
    kv.close(fill(kv, tokens(1, 2)))
    assert kv.used == 0
    assert cached_after(kv, tokens(1, 2, 3)) == 2 * SIZE


def test_at_least_one_token_is_left_to_compute() -> None:
    kv = kv_blocks()
    kv.close(fill(kv, tokens(1, 2, rest=0)))
    assert cached_after(kv, tokens(1, 2, rest=0)) == SIZE


def test_a_block_that_is_not_computed_is_not_found() -> None:
    kv = kv_blocks()
    table = take(kv, tokens(1, 2))
    kv.remember(table, tokens(1, 2), SIZE + 1)
    assert cached_after(kv, tokens(1, 2)) == SIZE


def test_another_root_shares_nothing() -> None:
    kv = kv_blocks()
    fill(kv, tokens(1), root="base")
    assert cached_after(kv, tokens(1), root="adapter") == 0


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    kv = kv_blocks()
    fill(kv, tokens(1, 2))
    assert cached_after(kv, tokens(3, 2)) == 0


def test_a_cache_that_is_switched_off_remembers_nothing() -> None:
    kv = kv_blocks(prefix_cache=False)
    kv.close(fill(kv, tokens(1, 2)))
    assert cached_after(kv, tokens(1, 2)) == 0


def test_what_was_used_longest_ago_is_evicted_first_and_leaves_before_their_parents() -> None:
    kv = kv_blocks(4)
    kv.close(fill(kv, tokens(1, 2, rest=0)))
    kv.close(fill(kv, tokens(3, 4, rest=0)))
    kv.close(take(kv, tokens(9, rest=0)))
    assert cached_after(kv, tokens(1, 2)) == SIZE
    assert cached_after(kv, tokens(3, 4, rest=0)) == SIZE  # its last token is left to compute


def test_a_held_prefix_is_not_evicted() -> None:
    kv = kv_blocks(3)
    held = fill(kv, tokens(1, 2, rest=0))
    assert kv.open("base", tokens(5, 6), reserve=0) is None
    kv.close(held)
    assert kv.open("base", tokens(5, 6), reserve=0) is not None


def test_two_that_compute_the_same_at_once_keep_their_own_blocks() -> None:
    kv = kv_blocks()
    first, second = take(kv, tokens(1, 2)), take(kv, tokens(1, 2))
    kv.remember(first, tokens(1, 2), 2 * SIZE)
    kv.remember(second, tokens(1, 2), 2 * SIZE)
    assert not set(first.blocks) & set(second.blocks)
    kv.close(first)
    kv.close(second)
    assert kv.used == 0
    assert cached_after(kv, tokens(1, 2)) == 2 * SIZE


class Root:
    """A name that can be watched."""


@pytest.mark.parametrize("computed", [True, False])
def test_a_root_is_forgotten_with_its_last_block(computed: bool) -> None:
    kv = kv_blocks(2)
    root = Root()
    watched = weakref.ref(root)
    table = kv.open(root, tokens(1), reserve=0)
    assert table is not None
    if computed:
        kv.remember(table, tokens(1), SIZE)
    kv.close(table)
    del root, table
    assert (watched() is not None) == computed
    kv.close(take(kv, tokens(2)))
    assert watched() is None


@given(
    blocks=st.integers(1, 12),
    prefix_cache=st.booleans(),
    seed=st.randoms(use_true_random=False),
)
def test_no_block_is_held_twice_and_all_come_back(
    blocks: int, prefix_cache: bool, seed: random.Random
) -> None:
    kv = kv_blocks(blocks, prefix_cache=prefix_cache)
    tables: list[tuple[PageTable, array[int]]] = []
    stored: dict[int, tuple[str, bytes]] = {}  # block: root and all tokens up to its end
    for _ in range(60):
        if tables and seed.random() < 0.5:
            table, _ = tables.pop(seed.randrange(len(tables)))
            kv.close(table)
        else:
            root = seed.choice("xy")
            token_ids = tokens(*seed.choices((1, 2), k=seed.randrange(4)), rest=seed.randint(1, 4))
            opened = kv.open(root, token_ids, reserve=0)
            if opened is None:
                continue
            cached = kv.cached_tokens(opened) // SIZE
            for index, block in enumerate(opened.blocks):
                content = (root, token_ids[: (index + 1) * SIZE].tobytes())
                if index < cached:
                    assert stored[block] == content
                stored[block] = content
            own = opened.blocks[cached:]
            assert not set(own) & {block for table, _ in tables for block in table.blocks}
            kv.remember(opened, token_ids, seed.randint(0, len(token_ids)))
            tables.append((opened, token_ids))
        held = Counter(block for table, _ in tables for block in set(table.blocks))
        assert len(held) <= kv.used <= blocks
    for table, _ in tables:
        kv.close(table)
    assert kv.used == 0
    everything = kv.open("z", array("i", range(blocks * SIZE)), reserve=0)
    assert everything is not None
    assert sorted(everything.blocks) == list(range(blocks))
