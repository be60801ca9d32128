"""What became of drafts, counted from single verifications."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.server.draft_words import draft_words

PLACES = 3


@given(st.lists(st.lists(st.integers(0, PLACES), max_size=12), min_size=1, max_size=3))
def test_words_are_those_of_a_list_of_verifications(choices):
    words = draft_words([tuple(map(each.count, range(PLACES + 1))) for each in choices])
    every = [length for each in choices for length in each]
    if not every:
        assert words == {}
        return
    assert words["verifications"] == len(every)
    assert words["mean_accepted_length"] == pytest.approx(1 + sum(every) / len(every))
    shares = [sum(n > place for n in every) / len(every) for place in range(PLACES)]
    assert words["acceptance"] == pytest.approx(shares)


def test_without_drafting_there_is_nothing_to_say():
    assert draft_words([(), ()]) == {}
