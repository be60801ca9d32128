"""How a step's tokens of known text are shared out."""

from __future__ import annotations

from collections.abc import Sequence


def share_budget(left: Sequence[int], budget: int, rows: int) -> list[int]:
    """Tokens that each of several prompts gets of a step's budget.

    The first gets half or more, so that it moves on whoever comes later; then those with the least
    left, so that short prompts do not wait behind long ones.

    Args:
        left: tokens each has left, in the queue's order.
        budget: tokens of the step.
        rows: prompts that get any, at most.
    """
    takes = [0] * len(left)
    if not left:
        return takes
    takes[0] = min(left[0], budget - budget // 2 if len(left) > 1 else budget)
    budget -= takes[0]
    for i in sorted(range(1, len(left)), key=left.__getitem__)[: rows - 1]:
        takes[i] = min(left[i], budget)
        budget -= takes[i]
    takes[0] = min(left[0], takes[0] + budget)
    return takes
