"""How a step's tokens of known text are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glmjax.scheduler.chunks import share_budget

LEFT = st.lists(st.integers(1, 40), max_size=12)
BUDGET = st.integers(2, 64)
ROWS = st.integers(1, 14)


@given(LEFT, BUDGET, ROWS)
def test_nobody_gets_too_much_and_nothing_is_left_lying(left, budget, rows):
    takes = share_budget(left, budget, rows)
    assert len(takes) == len(left)
    assert all(0 <= take <= n for take, n in zip(takes, left, strict=True))
    served = [n for take, n in zip(takes, left, strict=True) if take]
    assert len(served) <= rows
    assert sum(takes) <= budget
    if sum(takes) < budget:
        assert sum(takes) == sum(served)
        assert len(served) == min(rows, len(left))


@given(LEFT.filter(bool), BUDGET, ROWS)
def test_the_first_gets_half_or_all_it_needs(left, budget, rows):
    assert share_budget(left, budget, rows)[0] >= min(left[0], (budget + 1) // 2)


@given(LEFT, BUDGET, ROWS)
def test_shorter_ones_go_before_longer_ones(left, budget, rows):
    takes = share_budget(left, budget, rows)
    others = list(zip(left, takes, strict=True))[1:]
    for n, take in others:
        assert all(other == 0 for m, other in others if m > n) or take == n


def test_by_example():
    assert share_budget([], 8, 2) == []
    assert share_budget([100], 8, 2) == [8]
    assert share_budget([100, 50, 3], 8, 3) == [4, 1, 3]
    assert share_budget([100, 50, 3], 8, 2) == [5, 0, 3]
    assert share_budget([2, 50], 8, 2) == [2, 6]
    assert share_budget([9, 9], 8, 1) == [8, 0]
