"""Finding any of several stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=64)
def stop_matcher(stops: tuple[str, ...]) -> StopMatcher:
    """A matcher, shared by all sequences with the same stop strings: it holds no text."""
    return StopMatcher(stops)


class StopMatcher:
    """An Aho-Corasick automaton: time is linear in the text, whatever the number of stop strings.

    A state is the longest beginning of a stop string that the text ends with; 0 is none.

    Args:
        stops: strings to find, none of them empty.
    """

    def __init__(self, stops: Iterable[str]):
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._matched = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def pending(self, state: int) -> int:
        """How many characters at the end of the text may become a stop string."""
        return self._depth[state]

    def matched(self, state: int) -> int:
        """Length of the longest stop string that the text ends with; 0: none."""
        return self._matched[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._depth.append(self._depth[state] + 1)
                self._next.append({})
                self._fallback.append(0)
                self._matched.append(0)
            state = self._next[state][char]
        self._matched[state] = len(stop)

    def _link(self) -> None:
        """Set fallbacks, shallow states first: each needs those of shorter ones."""
        for state in sorted(range(len(self._next)), key=self._depth.__getitem__):
            for char, child in self._next[state].items():
                if state:
                    self._fallback[child] = self.step(self._fallback[state], char)
                shorter = self._matched[self._fallback[child]]
                self._matched[child] = self._matched[child] or shorter
