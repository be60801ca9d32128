"""The prefix cache against a naive one that knows single pages only, and by example."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glmjax.scheduler import prefix
from glmjax.scheduler.pages import PagePool, pages_for
from glmjax.scheduler.prefix import Node, PrefixCache

Prefix = tuple[int, ...]


def ids(tokens: Iterable[int]) -> np.ndarray:
    return np.asarray(list(tokens), np.int32)


def contents(cache: PrefixCache, page_size: int) -> dict[Prefix, int]:
    """Every page of the tree by the tokens that lead to it."""
    found: dict[Prefix, int] = {}
    stack: list[tuple[Node, Prefix]] = [(cache.root, ())]
    while stack:
        node, before = stack.pop()
        for key, page in zip(node.keys, node.pages, strict=True):
            tokens = tuple(np.frombuffer(key, np.int32).tolist())
            found[before + tokens] = page
            before += tokens[:page_size]
        assert node.live
        assert node.length * page_size == len(before)
        assert node is cache.root or node.pages
        for child in node.children.values():
            assert child.parent is node
            assert child.refs <= node.refs
            stack.append((child, before))
    return found


def free_pages(pool: PagePool) -> list[int]:
    return list(copy.deepcopy(pool).take(pool.free))


class Model:
    """A cache of single pages: a page may go when no longer prefix is left."""

    def __init__(self, page_size: int, lookahead: int):
        self.page_size, self.lookahead = page_size, lookahead
        self.pages: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.clock = count()

    def prefixes(self, tokens: list[int], most: int) -> list[Prefix]:
        n = min(most, len(tokens) - self.lookahead) // self.page_size
        return [tuple(tokens[: p * self.page_size + self.lookahead]) for p in range(1, n + 1)]

    def match(self, tokens: list[int], most: int) -> tuple[int, ...]:
        hit = [p for p in self.prefixes(tokens, most) if p in self.pages]
        self.touch(hit)
        return tuple(self.pages[p] for p in hit)

    def touch(self, prefixes: list[Prefix]) -> None:
        self.used |= dict.fromkeys(prefixes, next(self.clock))

    def evict(self, locked: set[int]) -> None:
        inner = {p[: -self.page_size] for p in self.pages}
        leaves = [p for p, page in self.pages.items() if p not in inner and page not in locked]
        del self.pages[min(leaves, key=self.used.__getitem__)]


@dataclass(eq=False)
class Running:
    """A sequence as a scheduler would keep it; `held` are the tree's pages down to its node."""

    tokens: list[int]
    node: Node
    held: list[int]
    pages: list[int]
    own: set[int] = field(default_factory=set)
    stale: bool = False


TEXT = st.lists(st.integers(0, 1) | st.integers(0, 2), min_size=1, max_size=14)
PART = st.floats(0, 1)
INDEX = st.integers(0, 99)


class CacheMachine(RuleBasedStateMachine):
    """Sequences start, grow, insert and end; pages run short; weights change."""

    @initialize(pages=st.integers(4, 24), page_size=st.integers(1, 4), lookahead=st.integers(0, 1))
    def start_empty(self, pages: int, page_size: int, lookahead: int):
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, page_size, lookahead)
        self.model = Model(page_size, lookahead)
        self.running: list[Running] = []

    @property
    def locked(self) -> set[int]:
        return {page for s in self.running for page in s.held}

    def take(self, n: int) -> list[int]:
        """Take from the cache, and let the model evict as many pages as are missing."""
        if n > self.cache.available:
            with pytest.raises(ValueError, match=f"{n} pages asked for"):
                self.cache.take(n)
            return []
        for _ in range(n - self.pool.free):
            self.model.evict(self.locked)
        taken = self.cache.take(n)
        assert len(taken) == n
        return list(taken)

    def fill(self, s: Running) -> bool:
        """Give a sequence pages for all its tokens, if there are enough."""
        missing = pages_for(len(s.tokens), self.model.page_size) - len(s.pages)
        new = self.take(missing)
        s.pages += new
        s.own |= set(new)
        return len(new) == missing

    def enter(self, s: Running, length: int) -> None:
        """Insert, and compare what the cache says of it with what the model knows."""
        prefixes = [] if s.stale else self.model.prefixes(s.tokens, length)
        new = list(zip(prefixes, s.pages, strict=False))[len(s.held) :]
        known = [page for p, page in new if p in self.model.pages]
        node, taken, duplicates = self.cache.insert(s.node, ids(s.tokens), s.pages, length)
        assert duplicates == known
        assert taken == len(new) - len(known)
        assert new or node is s.node
        s.node = node
        s.held += [self.model.pages.setdefault(p, page) for p, page in new]
        s.own -= set(s.held)

    def stop(self, s: Running) -> None:
        """Unlock, and give back what is the sequence's own."""
        self.running.remove(s)
        self.cache.unlock(s.node)
        self.cache.give_back(s.own)
        if not s.stale:
            self.model.touch(self.model.prefixes(s.tokens, len(s.held) * self.model.page_size))

    @rule(tokens=TEXT, part=PART)
    def look(self, tokens: list[int], part: float):
        most = round(part * len(tokens))
        assert self.cache.match(ids(tokens), most).pages == self.model.match(tokens, most)

    @rule(tokens=TEXT)
    def start(self, tokens: list[int]):
        hit = self.cache.match(ids(tokens), len(tokens) - 1)
        assert hit.pages == self.model.match(tokens, len(tokens) - 1)
        assert hit.node.length == len(hit.pages)
        self.cache.lock(hit.node)
        s = Running(tokens, hit.node, list(hit.pages), list(hit.pages))
        self.running.append(s)
        if not self.fill(s):
            self.stop(s)

    @precondition(lambda self: self.running)
    @rule(which=INDEX, tokens=TEXT)
    def grow(self, which: int, tokens: list[int]):
        s = self.running[which % len(self.running)]
        before = len(s.tokens)
        s.tokens = s.tokens + tokens
        if not self.fill(s):
            s.tokens = s.tokens[:before]

    @precondition(lambda self: self.running)
    @rule(which=INDEX, part=PART)
    def insert(self, which: int, part: float):
        s = self.running[which % len(self.running)]
        self.enter(s, round(part * len(s.tokens)))

    @precondition(lambda self: self.running)
    @rule(which=INDEX)
    def end(self, which: int):
        s = self.running[which % len(self.running)]
        self.enter(s, len(s.tokens))
        self.stop(s)

    @rule(part=PART)
    def pressure(self, part: float):
        self.cache.give_back(self.take(round(part * self.cache.available)))

    @rule(more=st.integers(1, 5))
    def greed(self, more: int):
        assert self.take(self.cache.available + more) == []

    @rule()
    def flush(self):
        self.cache.flush()
        self.model.pages.clear()
        for s in self.running:
            s.stale = True

    @invariant()
    def tree_is_the_model(self):
        assert contents(self.cache, self.model.page_size) == self.model.pages

    @invariant()
    def every_page_is_in_one_place(self):
        places = Counter(free_pages(self.pool))
        places.update({*self.model.pages.values()} | self.locked)
        for s in self.running:
            places.update(s.own)
        assert places == Counter(range(1, self.pool.capacity + 1))

    @invariant()
    def counts_are_right(self):
        idle = {*self.model.pages.values()} - self.locked
        assert self.cache.cached == len(idle)
        assert self.cache.available == self.pool.free + len(idle)

    @invariant()
    def sequences_stand_where_they_did(self):
        for s in self.running:
            path = list(s.node.path())[::-1]
            assert [page for node in path for page in node.pages] == s.held
            assert s.node.length == len(s.held)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    deadline=None, max_examples=120, stateful_step_count=40, report_multiple_bugs=False
)


def make_cache(pages: int = 17, page_size: int = 2, lookahead: int = 0) -> PrefixCache:
    return PrefixCache(PagePool(pages), page_size, lookahead)


def put(cache: PrefixCache, tokens: Sequence[int], page_size: int = 2) -> Node:
    """Run a sequence to its end; its node stays locked."""
    hit = cache.match(ids(tokens), len(tokens))
    cache.lock(hit.node)
    pages = hit.pages + cache.take(len(tokens) // page_size - len(hit.pages))
    return cache.insert(hit.node, ids(tokens), pages, len(tokens)).node


def keep(cache: PrefixCache, *texts: Sequence[int]) -> None:
    for tokens in texts:
        cache.unlock(put(cache, tokens))


def found(cache: PrefixCache, tokens: Sequence[int]) -> int:
    """Pages of two tokens that a match would find, without making them used."""
    cached = contents(cache, 2)
    return sum(tuple(tokens[:end]) in cached for end in range(2, len(tokens) + 1, 2))


def test_least_recently_used_goes_first():
    cache = make_cache(pages=7)
    a, b, c = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]
    keep(cache, a, b, c)
    cache.match(ids(a), 4)
    cache.take(1)  # of b, its last page
    assert [found(cache, t) for t in (a, b, c)] == [2, 1, 2]
    cache.take(2)
    assert [found(cache, t) for t in (a, b, c)] == [2, 0, 1]
    cache.take(2)
    assert [found(cache, t) for t in (a, b, c)] == [1, 0, 0]


def test_a_shared_beginning_outlives_its_continuations():
    cache = make_cache(pages=5)
    keep(cache, [1, 1, 2, 2], [1, 1, 3, 3], [5, 5])
    cache.take(2)
    assert found(cache, [1, 1, 2, 2]) == 1
    assert found(cache, [1, 1, 3, 3]) == 1
    assert found(cache, [5, 5]) == 1
    cache.take(1)
    assert found(cache, [1, 1]) == 0
    assert found(cache, [5, 5]) == 1


def test_a_use_ends_with_the_lock():
    cache = make_cache(pages=5)
    long_running = put(cache, [1, 1])
    keep(cache, [2, 2])
    cache.unlock(long_running)
    cache.take(3)
    assert (found(cache, [1, 1]), found(cache, [2, 2])) == (1, 0)


def test_locked_pages_stay():
    cache = make_cache(pages=5)
    node = put(cache, [1, 1, 2, 2])
    keep(cache, [1, 1, 3, 3])
    assert (cache.cached, cache.available) == (1, 2)
    cache.take(2)
    with pytest.raises(ValueError, match="1 pages asked for, 0 available"):
        cache.take(1)
    assert found(cache, [1, 1, 2, 2]) == 2
    cache.unlock(node)
    assert cache.available == cache.cached == 2


def test_split_under_lock_keeps_the_lower_node():
    cache = make_cache()
    node = put(cache, [1, 1, 2, 2, 3, 3])
    hit = cache.match(ids([1, 1, 2, 2, 4, 4]), 6)
    assert (node.length, hit.node.length, node.parent) == (3, 2, hit.node)
    assert hit.node.refs == 1
    cache.lock(hit.node)
    cache.unlock(node)
    assert cache.cached == 1
    cache.unlock(hit.node)
    assert cache.cached == 3
    assert hit.node.refs == node.refs == 0


def test_duplicates_stay_the_callers():
    cache = make_cache()
    tokens = ids([1, 1, 2, 2, 3, 3])
    first, second = cache.take(2), cache.take(3)
    for _ in range(2):
        cache.lock(cache.root)
    one = cache.insert(cache.root, tokens[:4], first, 4)
    two = cache.insert(cache.root, tokens, second, 6)
    assert (one.taken, one.duplicates) == (2, [])
    assert (two.taken, two.duplicates) == (1, list(second[:2]))
    assert cache.match(tokens, 6).pages == (*first, second[2])
    assert cache.insert(two.node, tokens, second, 6) == (two.node, 0, [])


def test_only_computed_and_known_pages_enter():
    cache = make_cache()
    tokens, pages = ids([1, 1, 2, 2, 3, 3]), cache.take(3)
    cache.lock(cache.root)
    assert cache.insert(cache.root, tokens, pages, 1) == (cache.root, 0, [])
    assert cache.insert(cache.root, tokens[:3], pages, 6).taken == 1
    assert len(cache.match(tokens, 6).pages) == 1


def test_the_token_after_a_page_counts_with_lookahead():
    cache = make_cache(lookahead=1)
    node = put(cache, [1, 1, 2, 2])
    assert node.length == 1  # what follows the second page is not known
    assert len(cache.match(ids([1, 1, 2]), 3).pages) == 1
    assert cache.match(ids([1, 1, 3]), 3).pages == ()
    assert cache.match(ids([1, 1]), 2).pages == ()


def test_at_most_so_many_tokens_match():
    cache = make_cache()
    keep(cache, [1, 1, 2, 2])
    sizes = [len(cache.match(ids([1, 1, 2, 2]), most).pages) for most in range(5)]
    assert sizes == [0, 0, 1, 1, 2]


def test_flush_under_lock():
    cache = make_cache(pages=9)
    keep(cache, [1, 1, 2, 2, 3, 3])
    node = put(cache, [1, 1, 4, 4])
    old_root = cache.root
    cache.lock(old_root)
    cache.flush()
    assert cache.root is not old_root
    assert (cache.cached, cache.available) == (0, 6)  # two are locked
    assert found(cache, [1, 1, 4, 4]) == 0
    more = cache.take(1)
    pages = (*(page for n in list(node.path())[::-1] for page in n.pages), *more)
    assert cache.insert(node, ids([1, 1, 4, 4, 5, 5]), pages, 6) == (node, 0, [])
    assert cache.insert(old_root, ids([6, 6]), more, 2) == (old_root, 0, [])
    keep(cache, [1, 1, 4, 4])
    cache.give_back(more)
    cache.unlock(node)
    cache.unlock(old_root)
    assert (cache.cached, cache.available) == (2, 8)
    assert found(cache, [1, 1, 4, 4]) == 2


def test_disabled_keeps_nothing():
    cache = PrefixCache(PagePool(9), 2, enabled=False)
    for _ in range(2):
        hit = cache.match(ids([1, 1, 2, 2]), 4)
        assert hit == (cache.root, ())
        cache.lock(hit.node)
        pages = cache.take(2)
        assert cache.insert(hit.node, ids([1, 1, 2, 2]), pages, 4) == (hit.node, 0, [])
        cache.unlock(hit.node)
        cache.give_back(pages)
        cache.flush()
    assert (cache.cached, cache.available) == (0, 8)


def test_misuse_is_refused():
    cache = make_cache(pages=3)
    with pytest.raises(ValueError, match="not locked"):
        cache.unlock(cache.root)
    with pytest.raises(ValueError, match="not locked"):
        cache.insert(cache.root, ids([1, 1]), [1], 2)
    cache.lock(cache.root)
    with pytest.raises(ValueError, match="2 pages to insert, but only 1 given"):
        cache.insert(cache.root, ids([1, 1, 2, 2]), [1], 4)
    keep(cache, [1, 1, 2, 2])
    hit = cache.match(ids([1, 1, 2, 2]), 4)
    cache.take(1)
    with pytest.raises(ValueError, match="pages are gone"):
        cache.lock(hit.node)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_a_sequence_in_chunks_grows_in_place(chunks: list[int]):
    total = sum(chunks)
    cache = make_cache(pages=total + 1)
    tokens, pages = ids(range(total)), cache.take(pages_for(total, 2))
    node = cache.root
    cache.lock(node)
    for length in np.cumsum(chunks).tolist():
        node = cache.insert(node, tokens, pages, length).node
        assert node.length == length // 2
        assert len(list(node.path())) <= 2
    cache.unlock(node)
    assert cache.cached == total // 2


def test_a_shared_leaf_does_not_grow():
    cache = make_cache()
    one, two = put(cache, [1, 1]), put(cache, [1, 1])
    assert one is two
    pages = [*one.pages, *cache.take(2)]
    longer = cache.insert(one, ids([1, 1, 2, 2]), pages, 4).node
    assert (longer.parent, two.length) == (two, 1)
    assert cache.insert(longer, ids([1, 1, 2, 2, 3, 3]), pages, 6).node is longer


class Counted(np.ndarray):
    """Counts the tokens that slices give out."""

    read = 0

    def __getitem__(self, key):
        part = np.asarray(self)[key]
        Counted.read += len(part)
        return part


@pytest.mark.parametrize("lookahead", [0, 1])
def test_an_insert_reads_what_it_adds(lookahead: int):
    size, chunk, n = 4, 40, 4000
    cache = make_cache(pages=n // size + 1, page_size=size, lookahead=lookahead)
    tokens, pages = ids(range(n + 1)).view(Counted), cache.take(n // size)
    node = cache.root
    cache.lock(node)
    Counted.read = 0
    for length in range(chunk, n + 1, chunk):
        node = cache.insert(node, tokens, pages, length).node
    assert node.length == n // size
    assert Counted.read == n + lookahead * n // chunk


def test_evictions_scan_nothing(monkeypatch: pytest.MonkeyPatch):
    leaves = 200
    cache = make_cache(pages=2 * leaves + 1)
    texts = [[i, i, i, i] for i in range(leaves)]
    keep(cache, *texts * 3)
    pops = Counter()
    pop = prefix.heapq.heappop
    monkeypatch.setattr(prefix.heapq, "heappop", lambda h: pops.update(["pop"]) or pop(h))
    for _ in range(2 * leaves):
        cache.take(1)
    assert cache.cached == 0
    # One a page, and one more for each leaf whose use was later than its place in the queue.
    assert pops["pop"] <= 3 * leaves
