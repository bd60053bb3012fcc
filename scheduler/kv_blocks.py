"""Which KV blocks are free, which a sequence holds, and which keep a prefix for later.

The prefix cache is a trie for each root (an adapter's content, or the base model). A node is one
full block, and has its number; a root has a number of its own, above those. What continues a node
is found by its number and the tokens of the next block themselves, so that no two prefixes are
confused. Whoever holds a node holds those above it; a sequence lets go of its nodes leaf first. So
the node that has been idle longest never has any below it, and eviction needs no search.
"""

import sys
from array import array
from collections import OrderedDict
from collections.abc import Hashable

NEVER = sys.maxsize

Edge = tuple[int, bytes]  # a node or root, and the tokens of a block after it


class PageTable:
    """The KV blocks of one running sequence. KvBlocks alone changes it.

    path has a root, then the nodes of the sequence's first blocks. Where an equal prefix was cached
    by another sequence meanwhile, the node is not the sequence's own block.
    """

    __slots__ = ("blocks", "path")

    def __init__(self, blocks: list[int], path: list[int]) -> None:
        self.blocks = blocks
        self.path = path


class KvBlocks:
    """The allocator of all KV blocks, numbered from 0."""

    def __init__(self, *, blocks: int, block_tokens: int, prefix_cache: bool) -> None:
        self.total = blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._free = list(range(blocks - 1, -1, -1))
        self._node_at: dict[Edge, int] = {}
        self._edge_to: list[Edge] = [(blocks, b"")] * blocks  # by node
        self._holders = [0] * blocks  # by node
        self._idle: OrderedDict[int, None] = OrderedDict()  # nodes not held; longest first
        self._root_of: dict[Hashable, int] = {}
        self._name_of: dict[int, Hashable] = {}  # by root
        self._uses: dict[int, int] = {}  # by root: tables and nodes right after it
        self._roots_before = blocks  # numbers that are not to be given to a root

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones, and cached ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.available

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def open(
        self, root: Hashable, token_ids: "array[int]", *, reserve: int, share: int = NEVER
    ) -> PageTable | None:
        """Blocks for all of token_ids, the first of them shared if their prefix is cached.

        At least one token is left to compute, and all that come after the first `share`. None if
        there are too few blocks, or fewer than `reserve` would be left.
        """
        path = self._match(root, token_ids, share)
        blocks = path[1:]
        self._hold(blocks)
        missing = self.blocks_for(len(token_ids)) - len(blocks)
        if missing + reserve > self.available:
            self._let_go(path)
            return None
        free = self._free
        blocks += [free.pop() if free else self._evict() for _ in range(missing)]
        return PageTable(blocks, path)

    def cached_tokens(self, table: PageTable) -> int:
        """Tokens from the start whose blocks are in the cache."""
        return (len(table.path) - 1) * self.block_tokens

    def extend(self, table: PageTable) -> int | None:
        """Give the table one more block; None if there is none."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block = self._evict()
        else:
            return None
        table.blocks.append(block)
        return block

    def remember(self, table: PageTable, token_ids: "array[int]", tokens: int) -> None:
        """Cache the full blocks of the first `tokens` tokens, whose KV is computed by now."""
        if not self._prefix_cache:
            return
        node_at, edge_to, holders, path = self._node_at, self._edge_to, self._holders, table.path
        parent, known = path[-1], len(path) - 1
        keys = _keys(token_ids, self.block_tokens, known, tokens // self.block_tokens)
        for edge_tokens, block in zip(keys, table.blocks[known:], strict=False):
            edge = (parent, edge_tokens)
            node = node_at.setdefault(edge, block)
            if node != block:
                self._hold([node])
            else:
                edge_to[node] = edge
                holders[node] = 1
                if parent >= self.total:
                    self._uses[parent] += 1
            path.append(node)
            parent = node

    def close(self, table: PageTable) -> None:
        """Take all blocks back; what is cached stays so until its block is needed."""
        blocks, path = table.blocks, table.path
        cached = len(path) - 1
        if blocks[:cached] != path[1:]:
            own = zip(path[1:], blocks, strict=False)
            self._free += [block for node, block in own if node != block]
        self._free += blocks[cached:]
        self._let_go(path)

    def _match(self, root: Hashable, token_ids: "array[int]", share: int) -> list[int]:
        """The root and the longest cached prefix of token_ids[:-1] and of token_ids[:share]. A use
        of the root is counted."""
        node = self._root_of.get(root)
        if node is None:
            self._roots_before = node = self._roots_before + 1
            self._root_of[root] = node
            self._name_of[node] = root
            self._uses[node] = 0
        self._uses[node] += 1
        path = [node]
        most = min(len(token_ids) - 1, share) // self.block_tokens
        for tokens in _keys(token_ids, self.block_tokens, 0, most):
            found = self._node_at.get((path[-1], tokens))
            if found is None:
                break
            path.append(found)
        return path

    def _hold(self, nodes: list[int]) -> None:
        for node in nodes:
            if self._holders[node] == 0:
                del self._idle[node]
            self._holders[node] += 1

    def _let_go(self, path: list[int]) -> None:
        holders, idle = self._holders, self._idle
        for node in path[:0:-1]:
            holders[node] -= 1
            if not holders[node]:
                idle[node] = None
        self._used_less(path[0])

    def _evict(self) -> int:
        node, _ = self._idle.popitem(last=False)
        edge = self._edge_to[node]
        del self._node_at[edge]
        if edge[0] >= self.total:
            self._used_less(edge[0])
        return node

    def _used_less(self, root: int) -> None:
        self._uses[root] -= 1
        if not self._uses[root]:
            del self._root_of[self._name_of.pop(root)]
            del self._uses[root]


def _keys(token_ids: "array[int]", block_tokens: int, first: int, end: int) -> list[bytes]:
    """The tokens of each block from `first` to `end`."""
    size = block_tokens * token_ids.itemsize
    tokens = token_ids[first * block_tokens : end * block_tokens].tobytes()
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]
