"""The prompt format of GLM-4.7: all of a turn on one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.chat import ChatTemplate

GLM47 = ChatTemplate(CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8"))
HI = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "\nanswer\n", "reasoning_content": "\nreason\n"}
PLAIN = {"role": "assistant", "content": "answer"}
INSIDE = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"function": {"name": "find", "arguments": '{"q": " é\\n", "n": 3, "o": {"é": [null]}}'}},
        {"function": {"name": "ping", "arguments": "{}"}},
    ],
}
CALL_TEXT = (
    "<tool_call>find<arg_key>q</arg_key><arg_value> é\n</arg_value><arg_key>n</arg_key>"
    '<arg_value>3</arg_value><arg_key>o</arg_key><arg_value>{"é": [null]}</arg_value></tool_call>'
    "<tool_call>ping</tool_call>"
)
RESULTS = [{"role": "tool", "content": " R1\n"}, {"role": "tool", "content": "R2"}]
OFF, KEEP = {"enable_thinking": False}, {"clear_thinking": False}

CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "thinking": ([HI], {}, "<|user|>hi<|assistant|><think>"),
    "thinking, said so": ([HI], {"enable_thinking": True}, "<|user|>hi<|assistant|><think>"),
    "no thinking": ([HI], OFF, "<|user|>hi<|assistant|></think>"),
    "system": ([SYSTEM, HI], {}, "<|system|>be brief<|user|>hi<|assistant|><think>"),
    "white space of a question": (
        [{"role": "user", "content": " hi\n"}],
        {},
        "<|user|> hi\n<|assistant|><think>",
    ),
    "earlier turn": (
        [HI, ANSWER, HI],
        {},
        "<|user|>hi<|assistant|></think>answer<|user|>hi<|assistant|><think>",
    ),
    "earlier turn, thoughts kept": (
        [HI, ANSWER, HI],
        KEEP,
        "<|user|>hi<|assistant|><think>reason</think>answer<|user|>hi<|assistant|><think>",
    ),
    "earlier turn, thoughts cleared": (
        [HI, INSIDE, HI],
        {"clear_thinking": True} | OFF,
        "<|user|>hi<|assistant|></think>yes<|user|>hi<|assistant|></think>",
    ),
    "earlier turn without a thought": (
        [HI, PLAIN, HI],
        KEEP | OFF,
        "<|user|>hi<|assistant|></think>answer<|user|>hi<|assistant|></think>",
    ),
    "turn after the last question": (
        [HI, ANSWER],
        {"add_generation_prompt": False},
        "<|user|>hi<|assistant|><think>reason</think>answer",
    ),
    "thought inside the content": (
        [HI, INSIDE],
        {"add_generation_prompt": False},
        "<|user|>hi<|assistant|><think>why</think>yes",
    ),
    "thought beside content with a tag": (
        [HI, INSIDE | {"reasoning_content": "a"}],
        {"add_generation_prompt": False},
        "<|user|>hi<|assistant|><think>a</think><think>\nwhy\n</think>\n\nyes",
    ),
    "empty thought beside content with a tag": (
        [HI, INSIDE | {"reasoning_content": ""}],
        {"add_generation_prompt": False},
        "<|user|>hi<|assistant|></think><think>\nwhy\n</think>\n\nyes",
    ),
    "thoughts of line breaks and of spaces": (
        [HI, *({"role": "assistant", "content": f"<think>{x}</think>a"} for x in ("\n\n", " "))],
        {"add_generation_prompt": False},
        "<|user|>hi<|assistant|></think>a<|assistant|><think></think>a",
    ),
    "calls and results": (
        [HI, CALLS | {"reasoning_content": "r"}, *RESULTS],
        {},
        f"<|user|>hi<|assistant|><think>r</think>{CALL_TEXT}<|observation|>"
        "<tool_response> R1\n</tool_response><tool_response>R2</tool_response>"
        "<|assistant|><think>",
    ),
    "an answer and calls": (
        [HI, CALLS | {"content": " so\n"}],
        {"add_generation_prompt": False},
        f"<|user|>hi<|assistant|></think>so{CALL_TEXT}",
    ),
    "two runs of results": (
        [HI, CALLS, RESULTS[1], PLAIN, RESULTS[1]],
        {},
        f"<|user|>hi<|assistant|></think>{CALL_TEXT}<|observation|><tool_response>R2"
        "</tool_response><|assistant|></think>answer<|observation|><tool_response>R2"
        "</tool_response><|assistant|><think>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_format(case: str):
    messages, variables, expected = CASES[case]
    assert GLM47.render(messages, **variables) == "[gMASK]<sop>" + expected


def test_tools_come_first_one_a_line():
    tool = {"type": "function", "function": {"name": "find", "description": "é", "b": 1, "a": 2}}
    text = GLM47.render([SYSTEM, HI], tools=[tool, tool])
    line = json.dumps(tool, ensure_ascii=False)
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n")
    assert f"<tools>\n{line}\n{line}\n</tools>" in text
    example = "<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>"
    assert text.endswith(example + "<|system|>be brief<|user|>hi<|assistant|><think>")


def test_variables_do_not_reach_inside():
    names = {"thought": "x", "answer": "x", "shown": True, "all_thoughts": True, "ns": "x"}
    messages = [HI, PLAIN, HI, PLAIN]
    assert GLM47.render(messages, **names) == GLM47.render(messages)


# The format once more, turn by turn

TEXTS = st.text(st.sampled_from("ab \n<>/é"), max_size=6)
VALUES = TEXTS | st.integers() | st.lists(st.booleans() | st.none(), max_size=2)
ARGUMENTS = st.dictionaries(TEXTS, VALUES, max_size=3)
FUNCTIONS = st.fixed_dictionaries({"name": TEXTS.filter(bool), "arguments": ARGUMENTS})
TURNS = st.one_of(
    st.builds(dict, role=st.sampled_from(["system", "user", "tool"]), content=TEXTS),
    st.builds(
        dict,
        role=st.just("assistant"),
        content=TEXTS,
        reasoning_content=st.none() | TEXTS,
        tool_calls=st.lists(st.builds(dict, function=FUNCTIONS), max_size=2),
    ),
)


def written(message: dict[str, Any], before: str, shown: bool) -> str:
    """One turn, told from the format's description."""
    role, content = message["role"], message["content"]
    if role == "tool":
        head = "" if before == "tool" else "<|observation|>"
        return f"{head}<tool_response>{content}</tool_response>"
    if role != "assistant":
        return f"<|{role}|>{content}"
    thought = message["reasoning_content"]
    parts = [f"<think>{thought.strip()}" if thought and shown else "", "</think>", content.strip()]
    for call in message["tool_calls"]:
        parts += [f"<tool_call>{call['function']['name']}"]
        for key, value in call["function"]["arguments"].items():
            text = value if isinstance(value, str) else json.dumps(value)
            parts += [f"<arg_key>{key}</arg_key><arg_value>{text}</arg_value>"]
        parts += ["</tool_call>"]
    return "<|assistant|>" + "".join(parts)


@given(st.lists(TURNS, min_size=1, max_size=8), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_conversation(messages, thinking: bool, clear: bool, more: bool):
    roles = ["", *(message["role"] for message in messages)]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=0) - 1
    turns = [
        written(message, roles[i], not clear or i > last) for i, message in enumerate(messages)
    ]
    end = ("<|assistant|><think>" if thinking else "<|assistant|></think>") if more else ""
    prompt = GLM47.render(
        messages, enable_thinking=thinking, clear_thinking=clear, add_generation_prompt=more
    )
    assert prompt == "[gMASK]<sop>" + "".join(turns) + end
