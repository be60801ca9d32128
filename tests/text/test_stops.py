"""The stop matcher against the plain definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glmjax.text.stops import StopMatcher

few_letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5)


@given(few_letters, stop_lists)
def test_states_mean_what_they_say(text: str, stops: list[str]):
    matcher, state = StopMatcher(stops), 0
    for end in range(1, len(text) + 1):
        state = matcher.step(state, text[end - 1])
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop) + 1)}
        seen = text[:end]
        assert matcher.pending(state) == max(
            (len(b) for b in beginnings if seen.endswith(b)), default=0
        )
        assert matcher.matched(state) == max(
            (len(stop) for stop in stops if seen.endswith(stop)), default=0
        )
