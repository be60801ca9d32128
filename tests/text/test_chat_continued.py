"""Prompts that end with the beginning of the answer."""

from __future__ import annotations

import pytest

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.errors import InvalidRequestError
from glmjax.text.chat import ChatTemplate

GLM = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
GLM47 = ChatTemplate(CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8"))
HI = {"role": "user", "content": "hi"}
OK = {"role": "assistant", "content": "ok"}
CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
# Takes text as it is, and ends a turn.
CHATML = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("template", "final", "end"),
    [
        (CHATML, {"content": "So far \n"}, "</user>\n<assistant>So far \n"),
        (CHATML, {"content": ""}, "</user>\n<assistant>"),
        (CHATML, {"content": "hi"}, "</user>\n<assistant>hi"),
        (CHATML, {"content": "a</assistant>\n"}, "</user>\n<assistant>a</assistant>\n"),
        (GLM, {"content": " So far "}, "<|assistant|>\n<think></think>\nSo far"),
        (GLM, {"content": ""}, "<|assistant|>\n<think></think>"),
        (GLM, {"content": "a", "reasoning": "b"}, "<|assistant|>\n<think>b</think>\na"),
        (GLM, {"content": None, "reasoning": "b"}, "<|assistant|>\n<think>b</think>"),
        (GLM, {"content": "<think>b</think>\na"}, "<|assistant|>\n<think>b</think>\na"),
        (GLM47, {"content": " So far "}, "<|assistant|></think>So far"),
        (GLM47, {"content": "", "tool_calls": []}, "<|assistant|></think>"),
        (GLM47, {"content": "a", "reasoning_content": "b "}, "<|assistant|><think>b</think>a"),
        (GLM47, {"content": [{"type": "text", "text": "a"}]}, "<|assistant|></think>a"),
    ],
)
def test_the_last_message_is_continued(template: ChatTemplate, final: dict, end: str):
    messages = [HI, OK, HI, {"role": "assistant"} | final]
    prompt = template.render(messages, continue_final_message=True)
    whole = template.render(messages, add_generation_prompt=False)
    assert prompt.endswith(end)
    assert whole.startswith(prompt)
    assert template.render(messages, continue_final_message=True, add_generation_prompt=False) == (
        prompt
    )


def test_a_text_that_is_shown_twice_is_continued_where_it_comes_last():
    twice = "{{ messages[-1].content }}|{{ messages[-1].content }}|"
    assert ChatTemplate(twice).render([OK], continue_final_message=True) == "ok|ok"
    trimmed = "{{ messages[-1].content | trim }}|{{ messages[-1].content | trim }}|"
    assert ChatTemplate(trimmed).render([OK], continue_final_message=True) == "ok|ok"


@pytest.mark.parametrize(
    ("final", "variables", "words"),
    [
        (OK, {"add_generation_prompt": True}, "add_generation_prompt begins a new message; leave"),
        (HI, {}, "the last message is of role user; end with one of role assistant"),
        ({"role": "tool", "content": "x"}, {}, "the last message is of role tool"),
        (CALLS, {}, "the last message has tool_calls"),
        (OK | {"content": "<think>a</think>\n\nb"}, {}, "send the thought in it as reasoning_con"),
    ],
)
def test_a_message_that_cannot_be_continued(final: dict, variables: dict, words: str):
    with pytest.raises(InvalidRequestError, match=f"^continue_final_message: .*{words}") as caught:
        GLM.render([HI, final], continue_final_message=True, **variables)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content }}", "{{ messages[-1].content | upper }}", "{{ messages | length }}"],
)
def test_a_text_that_is_not_there_cannot_be_continued(source: str):
    with pytest.raises(InvalidRequestError, match="changes the last message's text"):
        ChatTemplate(source).render([OK, OK | {"content": "So far"}], continue_final_message=True)
