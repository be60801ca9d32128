"""The pages of one data group's KV pool: which are free."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page ids from 1 on; page 0 is scratch, where padding tokens are written."""

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, 0, -1))
        self.capacity = pages - 1

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that are held."""
        return self.capacity - self.free

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` pages.

        Raises:
            ValueError: fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} free")
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages taken before."""
        self._free.extend(pages)


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // page_size)
