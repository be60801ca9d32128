"""How many drafts to verify: decided from what became of those before."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence

from glmjax.plans import Bucket

LEAST_CHANCE = 0.1  # a draft less likely to be accepted than this is not worth verifying
NEWEST = 0.1  # weight of the newest observation in a rate
RETRY_STEPS = 32  # a sequence that verifies fewer drafts than there are tries all after so many
EXPLORE_STEPS = 256  # how old a step's measured time may be
TRIAL_STEPS = 8  # with all drafts, once the time of a step with drafts is that old
TIMES_KEPT = 7


class Acceptance:
    """How often drafts at each place of the chain were accepted, those before them being so.

    Args:
        rates: one a place, to begin with.

    Attributes:
        rates: chance of each place, given that all before it were accepted.
        depth: drafts that are worth verifying.
        gain: tokens that verifying them adds to a step, on average.
    """

    def __init__(self, rates: list[float]):
        self.rates = list(rates)
        self._shortened = 0
        self._judge()

    def update(self, drafted: int, accepted: int) -> None:
        """Take in that the first `accepted` of `drafted` drafts were right."""
        rates = self.rates
        for place in range(min(accepted + 1, drafted)):
            rates[place] += NEWEST * ((place < accepted) - rates[place])
        self._judge()

    def observe(self, place: int, share: float) -> None:
        """Take in that this share of many chains that came to a place had it right."""
        self.rates[place] += NEWEST * (share - self.rates[place])
        self._judge()

    def next_depth(self) -> int:
        """Drafts to verify in the next step; now and then all, where not all are worth it."""
        return len(self.rates) if self._shortened >= RETRY_STEPS - 1 else self.depth

    def launched(self, drafts: int) -> None:
        """A step that verifies so many was launched."""
        self._shortened = 0 if drafts > self.depth else self._shortened + 1

    def _judge(self) -> None:
        chance, depth, gain = 1.0, 0, 0.0
        for rate in self.rates:
            chance *= rate
            if chance < LEAST_CHANCE:
                break
            depth += 1
            gain += chance
        self.depth, self.gain = depth, gain


class Drafting:
    """Whether steps should draft at all: measured acceptance against measured time.

    Args:
        num_drafts: places of a chain.

    Attributes:
        overall: rates over all sequences, where a new one begins.
        drafted, accepted: drafts verified and accepted at each place, since the beginning.
        verifications: how often drafts of a sequence were verified.
        trying: whether the last answer of `pays` was a trial: then all drafts are verified, since
            nothing else would show that they have become better.
    """

    def __init__(self, num_drafts: int):
        self.overall = Acceptance([0.7] * num_drafts)
        self.drafted = [0] * num_drafts
        self.accepted = [0] * num_drafts
        self.verifications = 0
        self._times: dict[Bucket, deque[float]] = {}
        self._measured: dict[Bucket, int] = {}
        self._steps = 0
        self._trial = 0
        self.trying = False

    def record(self, drafted: Sequence[int], counts: Sequence[int]) -> None:
        """Count what became of a step's drafts.

        Args:
            drafted: drafts that each sequence had verified.
            counts: new tokens each got, one more than were accepted; may be longer.
        """
        chains = Counter(zip(drafted, counts, strict=False))
        self.verifications += sum(n for (drafts, _), n in chains.items() if drafts)
        for place in range(len(self.drafted)):
            tried = sum(n for (drafts, _), n in chains.items() if drafts > place)
            reached = sum(n for (drafts, count), n in chains.items() if min(drafts, count) > place)
            right = sum(n for (drafts, count), n in chains.items() if drafts and count - 1 > place)
            self.drafted[place] += tried
            self.accepted[place] += right
            if reached:
                self.overall.observe(place, right / reached)

    def measured(self, bucket: Bucket, seconds: float) -> None:
        """Learn how long a step of this shape took."""
        self._times.setdefault(bucket, deque(maxlen=TIMES_KEPT)).append(seconds)
        self._measured[bucket] = self._steps

    def pays(self, gain: float, drafting: Bucket, plain: Bucket) -> bool:
        """Whether a step that verifies drafts gives more tokens a second than one without.

        A shape that was not measured for long is tried, so that the answer can change.

        Args:
            gain: tokens a sequence that accepted drafts are expected to add.
            drafting, plain: the shapes to choose from.
        """
        self._steps += 1
        if self._stale(drafting):
            self._trial = TRIAL_STEPS
        self.trying = self._trial > 0
        if self.trying:
            self._trial -= 1
            return True
        if self._stale(plain):
            return False
        return (1.0 + gain) * self._time(plain) > self._time(drafting)

    def _stale(self, bucket: Bucket) -> bool:
        return self._steps - self._measured.get(bucket, -EXPLORE_STEPS) >= EXPLORE_STEPS

    def _time(self, bucket: Bucket) -> float:
        return statistics.median(self._times[bucket])
