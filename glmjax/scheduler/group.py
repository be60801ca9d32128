"""Slots and pages of one data group, and the sequences that hold them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from operator import attrgetter

import numpy as np

from glmjax.plans import Limits
from glmjax.scheduler.admission import Foresight, shared_pages
from glmjax.scheduler.pages import PagePool, pages_for
from glmjax.scheduler.prefix import PrefixCache
from glmjax.scheduler.sequence import Sequence, State

_ENDED = (State.PREEMPTED, State.FINISHED)


class Group:
    """Who runs in a data group, and on which pages.

    Args:
        index: which group.
        limits: what the runner offers.
        prefix_cache: keep computed pages for sequences that begin alike.
        requeue: takes a preempted sequence once it has left.

    Attributes:
        running: sequences that hold a slot, by place; ended ones too until no launched step has a
            row for them.
        free_slots: the others.
        cache: its pages.
        preemptions: sequences taken off the device so far.
    """

    def __init__(
        self,
        index: int,
        limits: Limits,
        prefix_cache: bool,
        requeue: Callable[[Sequence], None],
    ):
        self.index = index
        self.running: list[Sequence] = []
        self.free_slots = list(range(limits.slots))[::-1]
        self.pool = PagePool(limits.pages)
        self._lookahead = int(limits.num_drafts > 0)  # a draft layer's KV depends on the next token
        self._shares = prefix_cache
        self.cache = PrefixCache(self.pool, limits.page_size, self._lookahead, prefix_cache)
        self.preemptions = 0
        self._limits = limits
        self._requeue = requeue
        self._foresight = Foresight()

    # who runs

    def cached_len(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that need not be computed here."""
        hit = self.cache.match(sequence.learn_known(), self._most_cached(sequence))
        return len(hit.pages) * self._limits.page_size

    def try_start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and pages for what it knows, if there is room for its output too.

        Where nothing else runs, what it knows is enough: so the first in the queue always starts.
        """
        known = sequence.learn_known()
        hit = self.cache.match(known, self._most_cached(sequence))
        self.cache.lock(hit.node)
        needed = self._pages_for(sequence, len(known)) - len(hit.pages)
        if self.cache.available < needed + self._set_aside(sequence):
            self.cache.unlock(hit.node)
            return False
        pages = [*hit.pages, *self.cache.take(needed)]
        cached = len(hit.pages) * self._limits.page_size
        sequence.start(self.index, self.free_slots.pop(), hit.node, pages, cached)
        insort(self.running, sequence, key=attrgetter("place"))
        return True

    def computes_prefix_of(self, sequence: Sequence) -> bool:
        """Whether a running sequence will soon have computed more of this one than is cached."""
        # What was begun before a flush is of no use to others.
        useful = (s for s in self.running if s.prefilling and s.node is not None and s.node.live)
        others = list(useful) if self._shares else []
        if not others:
            return False
        known, page_size = sequence.learn_known(), self._limits.page_size
        cached, most = self.cached_len(sequence), self._most_cached(sequence)
        for other in others:
            usable = shared_pages(known[:most], other.known, page_size)
            if self._lookahead and usable * page_size == len(other.known):
                usable -= 1  # the token after its last page is not known yet
            if usable * page_size > max(other.planned_len, cached):
                return True
        return False

    def reserve(self, sequence: Sequence, positions: int) -> bool:
        """See to it that a running sequence has pages for so many positions.

        The latest in the queue's order is preempted until there is room, so the first always runs.
        Pages that launched steps still hold back are waited for, not taken from others.

        Returns:
            False: it must wait for pages, or has given up its own.
        """
        if positions + self._limits.num_drafts <= len(sequence.pages) * self._limits.page_size:
            return True
        needed = self._pages_for(sequence, positions) - len(sequence.pages)
        while self.cache.available < needed:
            if any(s.state in _ENDED for s in self.running):
                return False
            self.preempt(self.last())
            if sequence.state is not State.RUNNING:
                return False
        if needed > 0:
            sequence.pages.extend(self.cache.take(needed))
        return True

    def last(self) -> Sequence:
        """The running sequence that is last in the queue's order."""
        return next(s for s in reversed(self.running) if s.state is State.RUNNING)

    def preempt(self, sequence: Sequence) -> None:
        """`retract` a sequence for want of pages or slots, of which to set aside more then."""
        self._foresight.preempted()
        self.retract(sequence)

    def retract(self, sequence: Sequence) -> None:
        """Take a sequence off the device; it is computed again from its tokens later."""
        self.preemptions += 1
        sequence.state = State.PREEMPTED
        self.release_if_idle(sequence)

    def release_if_idle(self, sequence: Sequence) -> None:
        """Free what an ended sequence holds, once no launched step has a row for it."""
        if sequence.state not in _ENDED or sequence.in_flight or sequence.slot < 0:
            return
        computed = sequence.planned_len >= len(sequence.known)
        self.keep(sequence, len(sequence.tokens) - 1 if computed else sequence.planned_len)
        assert sequence.node is not None
        own = sequence.pages[sequence.node.length :]
        self.cache.unlock(sequence.node)
        self.cache.give_back([*own, *sequence.duplicates])
        self.free_slots.append(sequence.slot)
        self.running.remove(sequence)
        sequence.leave()
        if sequence.state is State.WAITING:
            self._requeue(sequence)

    # what is cached

    def keep(self, sequence: Sequence, length: int) -> None:
        """Let others find the first `length` positions of a sequence, which steps have computed."""
        assert sequence.node is not None
        page_size = self._limits.page_size
        if length // page_size <= sequence.node.length or sequence.spoiled:
            return
        tokens = sequence.known
        if length >= len(tokens):
            tokens = np.asarray(sequence.tokens, np.int32)
        inserted = self.cache.insert(sequence.node, tokens, sequence.pages, length)
        sequence.node = inserted.node
        sequence.duplicates += inserted.duplicates

    def stepped(self) -> None:
        """A step went by."""
        self._foresight.stepped()

    @property
    def used_pages(self) -> int:
        """Pages that running sequences hold."""
        return self.pool.capacity - self.cache.available

    def _most_cached(self, sequence: Sequence) -> int:
        """Positions that may be taken from the cache: the last token is always computed."""
        first = sequence.first_logprob
        most = len(sequence.known) - 1
        return most if first is None else min(most, max(first - 1, 0))

    def _pages_for(self, sequence: Sequence, positions: int) -> int:
        """With what the drafts behind these positions need, but never beyond its end."""
        positions = min(positions + self._limits.num_drafts, sequence.total_len)
        return pages_for(positions, self._limits.page_size)

    def _set_aside(self, sequence: Sequence) -> int:
        """Pages kept free for the output of those that run, and of who is about to start."""
        others = [s for s in self.running if s.state is State.RUNNING]
        if not others:
            return 0
        tokens = sum(self._foresight.tokens(s) for s in (*others, sequence))
        return pages_for(int(tokens), self._limits.page_size)
