"""Results of tools reach the model in the order of its calls, whatever order they were sent in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.chat import ChatTemplate
from glmjax.text.tool_results import in_call_order

HI = {"role": "user", "content": "hi"}
NAMES = list("abcd")


def asked(names: Any) -> dict[str, Any]:
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def told(name: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": f"result {name}"}


@given(st.permutations(NAMES), st.permutations(NAMES), st.integers(1, 4))
def test_any_order_is_the_calls_order(calls: list[str], results: list[str], count: int):
    sent = results[:count]
    messages = [HI, asked(calls), *map(told, sent), HI, asked("a"), told("a")]
    expected = [told(name) for name in calls if name in sent]
    assert in_call_order(messages) == [HI, asked(calls), *expected, HI, asked("a"), told("a")]


@pytest.mark.parametrize(
    "names", [["b", "x"], ["b", None], ["b", "b"], ["b", ["a"]], [{}, "a"], [None, None]]
)
def test_results_that_fit_no_call_stay(names: list[Any]):
    messages = [HI, asked("ab"), *map(told, names)]
    assert in_call_order(messages) == messages


def test_calls_with_one_id_and_results_of_nothing_stay():
    for messages in ([asked("aab"), told("b"), told("a")], [told("b"), told("a")], [HI, told("a")]):
        assert in_call_order(messages) == messages


def test_the_prompt_has_them_in_order():
    template = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
    there, back = ([HI, asked("ab"), told(x), told(y)] for x, y in ("ab", "ba"))
    assert template.render(back) == template.render(there)
    prompt = template.render(back)
    assert prompt.index("result a") < prompt.index("result b")
