"""The prefix cache of one data group: KV pages by the tokens they were computed from.

A radix tree. An edge is a run of whole pages, each known by its key: the bytes of its tokens.
Sequences lock the path they stand on. What nobody locks stays for those to come, until its pages
are needed: then leaves go, least recently used first.

A page is always exactly one of: free in the pool, in the tree, or a caller's. Pages that were
flushed while locked count as the tree's until they are unlocked.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import NamedTuple

import numpy as np

from glmjax.scheduler.pages import PagePool

_TOKEN_BYTES = np.dtype(np.int32).itemsize


@dataclass(eq=False, slots=True)
class Node:
    """A run of pages below its parent's.

    Attributes:
        parent: None for a root.
        children: by the key of their first page.
        keys, pages: of the run, one each a page. Empty in a root, and once the pages are gone.
        length: pages from the root to its end.
        refs: locks on it and on all below.
        used: when it was last used, by the cache's clock.
        live: whether it can be found and extended.
        queued: whether it stands in the cache's queue of leaves.
    """

    parent: Node | None = field(default=None, repr=False)
    children: dict[bytes, Node] = field(default_factory=dict, repr=False)
    keys: list[bytes] = field(default_factory=list, repr=False)
    pages: list[int] = field(default_factory=list)
    length: int = 0
    refs: int = 0
    used: int = 0
    live: bool = True
    queued: bool = False

    @property
    def evictable(self) -> bool:
        """Whether it is a leaf that nobody locks."""
        return bool(self.pages) and not self.children and not self.refs

    def path(self) -> Iterator[Node]:
        """It and all above, up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def subtree(self) -> Iterator[Node]:
        """It and all below."""
        nodes: list[Node] = [self]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            yield node

    def split(self, at: int) -> Node:
        """Leave the first `at` pages to a new parent, and return that.

        Whoever holds this node still ends where it did.
        """
        upper = Node(self.parent, refs=self.refs, used=self.used)
        upper.length = self.length - len(self.pages) + at
        # The head keeps the lists, so that the cost is the tail's.
        upper.keys, self.keys = self.keys, self.keys[at:]
        upper.pages, self.pages = self.pages, self.pages[at:]
        del upper.keys[at:], upper.pages[at:]
        upper.children[self.keys[0]] = self
        if self.parent is not None:
            self.parent.children[upper.keys[0]] = upper
        self.parent = upper
        return upper

    def extend(self, keys: list[bytes], pages: Sequence[int]) -> None:
        """Add pages at the end of the run."""
        self.keys += keys
        self.pages += pages
        self.length += len(pages)


class Hit(NamedTuple):
    """A cached prefix.

    Attributes:
        node: where it ends. Lock it before anything else is asked of the cache.
        pages: its page ids, from position 0 on.
    """

    node: Node
    pages: tuple[int, ...]


class Inserted(NamedTuple):
    """What became of a sequence's pages.

    Attributes:
        node: where the sequence stands now; the lock is on it.
        taken: how many pages are the tree's now, the last ones up to `node.length`.
        duplicates: page ids that the tree has others for; still the caller's.
    """

    node: Node
    taken: int
    duplicates: list[int]


class PrefixCache:
    """Owns a pool's pages: lends them to sequences, and keeps those that may be used again.

    Args:
        pool: the group's pages.
        page_size: token positions a page.
        lookahead: how many tokens after a position its KV depends on; 1 with drafting, whose
            layer sees the next token. A page is used again only if these follow it too.
        enabled: False: nothing is kept.
    """

    def __init__(self, pool: PagePool, page_size: int, lookahead: int = 0, enabled: bool = True):
        self._pool = pool
        self._page_size = page_size
        self._lookahead = lookahead
        self._enabled = enabled
        self._clock = count(1)
        self._restart()

    def _restart(self) -> None:
        self.root = Node(live=self._enabled)
        self._cached = 0
        # Each evictable leaf has one entry (used, tie-break, leaf), never later than its last use;
        # entries that do not hold any more are put right when they come up.
        self._leaves: list[tuple[int, int, Node]] = []

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and those that only the cache holds."""
        return self._pool.free + self._cached

    @property
    def cached(self) -> int:
        """Pages that only the cache holds."""
        return self._cached

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` pages, evicting as few cached ones as that needs.

        Raises:
            ValueError: fewer are available; nothing has changed then.
        """
        if count > self.available:
            raise ValueError(f"{count} pages asked for, {self.available} available")
        while (missing := count - self._pool.free) > 0:
            self._evict(missing)
        return self._pool.take(count)

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that were taken and are not the tree's."""
        self._pool.give_back(pages)

    def match(self, token_ids: np.ndarray, most: int) -> Hit:
        """The longest cached prefix in whole pages. It is marked as used, but not locked.

        Args:
            token_ids: int32 [n], from position 0 on.
            most: tokens that it may have at most.
        """
        end = min(most, len(token_ids) - self._lookahead) // self._page_size
        node = _descend(self.root, self._page_keys(token_ids, 0, end))
        self._touch(node)
        path = reversed(list(node.path()))
        return Hit(node, tuple(page for part in path for page in part.pages))

    def lock(self, node: Node) -> None:
        """Keep a node and all above it from being evicted. Locks add up.

        Raises:
            ValueError: its pages are gone already.
        """
        if node.length and not node.pages:
            raise ValueError("the node's pages are gone; match again, and lock at once")
        self._lock(node.path())

    def unlock(self, node: Node) -> None:
        """Take back one lock. That counts as a use.

        Raises:
            ValueError: there is none.
        """
        _check_locked(node)
        self._touch(node)
        for part in node.path():
            part.refs -= 1
            if not part.refs:
                self._retire(part)

    def insert(
        self, node: Node, token_ids: np.ndarray, pages: Sequence[int], length: int
    ) -> Inserted:
        """Enter a sequence's whole pages beyond `node`, and move its lock to where they end.

        Nothing happens where there is none to enter, or the node is of before a flush.

        Args:
            node: where the sequence stands, with one lock of its own.
            token_ids: int32 [n], its tokens from position 0 on, as far as they are known.
            pages: its page ids, from position 0 on.
            length: positions whose KV is computed and valid.

        Raises:
            ValueError: `node` is not locked, or `pages` end before `length`.
        """
        end = min(length, len(token_ids) - self._lookahead) // self._page_size
        if not node.live or end <= node.length:
            return Inserted(node, 0, [])
        _check_locked(node)
        if end > len(pages):
            raise ValueError(f"{end} pages to insert, but only {len(pages)} given")
        start, keys = node.length, self._page_keys(token_ids, node.length, end)
        found = _descend(node, keys)
        known = found.length
        self._lock(takewhile(lambda part: part is not node, found.path()))
        last = _extend(found, keys[known - start :], pages[known:end])
        return Inserted(last, end - known, list(pages[start:known]))

    def flush(self) -> None:
        """Forget all that was cached. Locked pages are free once they are unlocked."""
        for node in self.root.subtree():
            node.live = False
            if not node.refs:
                self._release(node)
        self._restart()

    def _page_keys(self, token_ids: np.ndarray, start: int, end: int) -> list[bytes]:
        """Keys of pages `start` to `end`: their tokens, and the lookahead after each."""
        first, last = start * self._page_size, end * self._page_size + self._lookahead
        data = np.asarray(token_ids[first:last], np.int32).tobytes()
        step = self._page_size * _TOKEN_BYTES
        width = step + self._lookahead * _TOKEN_BYTES
        return [data[at : at + width] for at in range(0, (end - start) * step, step)]

    def _touch(self, node: Node) -> None:
        now = next(self._clock)
        for part in node.path():
            part.used = now

    def _lock(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.refs:
                self._cached -= len(node.pages)
            node.refs += 1

    def _retire(self, node: Node) -> None:
        """The last lock is gone."""
        if node.live:
            self._cached += len(node.pages)
            self._queue(node)
        else:
            self._release(node)

    def _release(self, node: Node) -> None:
        self._pool.give_back(node.pages)
        node.live, node.keys, node.pages = False, [], []

    def _queue(self, node: Node) -> None:
        if node.evictable and not node.queued:
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._clock), node))

    def _oldest_leaf(self) -> Node:
        """Take the least recently used evictable leaf out of the queue."""
        while True:
            used, _, leaf = heapq.heappop(self._leaves)
            leaf.queued = False
            if leaf.evictable and leaf.used == used:
                return leaf
            self._queue(leaf)

    def _evict(self, most: int) -> None:
        """Free the oldest leaf, or its last `most` pages."""
        leaf = self._oldest_leaf()
        if len(leaf.pages) > most:
            leaf.split(len(leaf.pages) - most)
        parent = leaf.parent
        assert parent is not None  # a root has no pages
        del parent.children[leaf.keys[0]]
        self._cached -= len(leaf.pages)
        self._release(leaf)
        self._queue(parent)


def _descend(node: Node, keys: list[bytes]) -> Node:
    """Where pages with these keys, following `node`, end or leave the tree; split there."""
    at = 0
    while at < len(keys) and (child := node.children.get(keys[at])) is not None:
        same = _common(child.keys, keys[at : at + len(child.keys)])
        if same < len(child.keys):
            return child.split(same)
        node, at = child, at + same
    return node


def _common(ours: list[bytes], theirs: list[bytes]) -> int:
    """Number of first keys that are equal."""
    differ = (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(ours), len(theirs)))


def _extend(node: Node, keys: list[bytes], pages: Sequence[int]) -> Node:
    """Add new pages after a node, in it if nobody else can tell, and return where they end."""
    if not keys:
        return node
    alone = node.refs == 1 and not node.children and node.parent is not None
    if not alone:
        child = Node(node, length=node.length, refs=1)
        node.children[keys[0]] = child
        node = child
    node.extend(keys, pages)
    return node


def _check_locked(node: Node) -> None:
    if not node.refs:
        raise ValueError("the node is not locked")
