"""Which KV blocks are free, which a sequence holds, and which keep a prefix for later.

The prefix cache is a trie for each root (an adapter's content, or the base model). A node is one
full block; its key is the tokens of that block themselves, so that no two prefixes are confused.
Whoever holds a node holds those above it; a sequence lets go of its nodes leaf first. So the node
that has been idle longest never has children, and eviction needs no search.
"""

import sys
from array import array
from collections import OrderedDict
from collections.abc import Hashable

NEVER = sys.maxsize


class Node:
    """A cached block; or, with block -1, the root of a trie."""

    __slots__ = ("block", "children", "holders", "key", "parent")

    def __init__(self, parent: "Node | None", key: Hashable, block: int) -> None:
        self.parent = parent
        self.key = key  # the bytes of its tokens; of a root, its name
        self.block = block
        self.children: dict[Hashable, Node] = {}
        self.holders = 0


class PageTable:
    """The KV blocks of one running sequence. KvBlocks alone changes it.

    path[1:] are the cache entries of its first blocks. Where an equal prefix was cached by another
    sequence meanwhile, the entry's block is not the sequence's own.
    """

    __slots__ = ("blocks", "path")

    def __init__(self, blocks: list[int], path: list[Node]) -> None:
        self.blocks = blocks
        self.path = path


class KvBlocks:
    """The allocator of all KV blocks, numbered from 0."""

    def __init__(self, *, blocks: int, block_tokens: int, prefix_cache: bool) -> None:
        self.total = blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._free = list(range(blocks - 1, -1, -1))
        self._roots: dict[Hashable, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # cached, not held; longest first

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
        for node in path:
            self._hold(node)
        missing = self.blocks_for(len(token_ids)) - (len(path) - 1)
        if missing + reserve > self.available:
            self._let_go(path)
            return None
        blocks = [node.block for node in path[1:]]
        blocks += [self._take() for _ in range(missing)]
        return PageTable(blocks, path)

    def cached_tokens(self, table: PageTable) -> int:
        """Tokens from the start whose blocks are in the cache."""
        return (len(table.path) - 1) * self.block_tokens

    def extend(self, table: PageTable) -> int | None:
        """Give the table one more block; None if there is none."""
        if not self._free and not self._idle:
            return None
        block = self._take()
        table.blocks.append(block)
        return block

    def remember(self, table: PageTable, token_ids: "array[int]", tokens: int) -> int:
        """Cache the full blocks of the first `tokens` tokens, whose KV is computed by now.

        Returns how many tokens must be computed before there is another block to cache.
        """
        if not self._prefix_cache:
            return NEVER
        path, size = table.path, self.block_tokens
        end = len(path) * size
        while end <= tokens:
            key = token_ids[end - size : end].tobytes()
            parent = path[-1]
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = Node(parent, key, table.blocks[len(path) - 1])
                node.holders = 1
            else:
                self._hold(node)
            path.append(node)
            end += size
        return end

    def close(self, table: PageTable) -> None:
        """Take all blocks back; what is cached stays so until its block is needed."""
        blocks, path = table.blocks, table.path
        cached = len(path) - 1
        self._free += [
            block for node, block in zip(path[1:], blocks, strict=False) if node.block != block
        ]
        self._free += blocks[cached:]
        self._let_go(path)

    def _match(self, root: Hashable, token_ids: "array[int]", share: int) -> list[Node]:
        """The root and the longest cached prefix of token_ids[:-1] and of token_ids[:share]."""
        node: Node | None = self._roots.get(root)
        if node is None:
            node = self._roots[root] = Node(None, root, -1)
        path, size = [node], self.block_tokens
        for start in range(0, min(len(token_ids) - 1, share) - size + 1, size):
            node = node.children.get(token_ids[start : start + size].tobytes())
            if node is None:
                break
            path.append(node)
        return path

    def _hold(self, node: Node) -> None:
        if node.holders == 0:
            self._idle.pop(node, None)
        node.holders += 1

    def _let_go(self, path: list[Node]) -> None:
        for node in reversed(path):
            node.holders -= 1
            if node.holders == 0 and node.parent is not None:
                self._idle[node] = None
        self._drop_if_empty(path[0])

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        node, _ = self._idle.popitem(last=False)
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.key]
        if parent.parent is None:
            self._drop_if_empty(parent)
        return node.block

    def _drop_if_empty(self, root: Node) -> None:
        if not root.children and root.holders == 0:
            del self._roots[root.key]
