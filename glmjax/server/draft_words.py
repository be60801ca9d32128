"""What became of a request's drafts, in words."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, zip_longest
from typing import Any


def draft_words(lengths: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    """Of one or more choices; empty where nothing was drafted.

    Args:
        lengths: of each choice, how often 0, 1, 2, ... drafts of a verification were accepted.

    Returns:
        `verifications`; `mean_accepted_length`, tokens a verification gave, the model's own one
        included; `acceptance`, by place in the chain, the share of verifications that accepted it.
    """
    counts = [sum(column) for column in zip_longest(*lengths, fillvalue=0)]
    total = sum(counts)
    if not total:
        return {}
    at_least = list(accumulate(reversed(counts)))[::-1]
    accepted = [n / total for n in at_least[1:]]
    return {
        "verifications": total,
        "mean_accepted_length": 1 + sum(accepted),
        "acceptance": accepted,
    }
