"""Thought and answer, as OpenAI's client sees them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict
from scripted import FORMS, HI, WEATHER, Chat, chatting, streamed

from glmjax.server.served import ServedModel


def prompt_length(chat: Chat, messages: Any = HI, **variables: Any) -> int:
    return len(chat.server.frontend.served.chat_prompt(messages, **variables))


def test_thought_and_answer_come_apart(chat: Chat):
    chat.answer("One thing,\nand another. ", "Yes.\n\nAnd no. ")
    said = chat.both()
    assert said.reasoning == "One thing,\nand another."
    assert said.content.rstrip() == "Yes.\n\nAnd no."
    assert said.finish == "stop"


def test_a_thought_comes_as_it_is_thought(chat: Chat):
    chat.answer("a long and winding thought", "Yes.")

    def thoughts(**options: Any) -> list[str]:
        deltas = [chunk.choices[0].delta for chunk in chat.stream(**options) if chunk.choices]
        found = [getattr(delta, "reasoning_content", None) for delta in deltas]
        return [thought for thought in found if thought is not None]

    assert len(thoughts()) > 3
    assert thoughts(stream_reasoning=False) == ["".join(thoughts())]
    assert chat.both(stream_reasoning=False) == chat.both()


def test_a_thought_may_stay_in_the_content(chat: Chat):
    chat.answer("hm", "Yes.")
    said = chat.both(separate_reasoning=False)
    assert (said.reasoning, said.content) == ("", chat.form.thought("hm") + chat.form.text + "Yes.")


OFF: list[dict[str, Any]] = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"enable_thinking": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
]
ON: list[dict[str, Any]] = [
    {},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"enable_thinking": True},
    {"thinking": {"type": "enabled"}},
    {"thinking": {"type": "adaptive"}},
    {"reasoning_effort": "high"},
    {"enable_thinking": True, "reasoning_effort": "none"},
]


@pytest.mark.parametrize("options", OFF)
def test_thinking_is_switched_off(chat: Chat, options: dict[str, Any]):
    chat.say("Yes.")
    answer = chat.ask(**options)
    assert answer.usage.prompt_tokens == prompt_length(chat, enable_thinking=False)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    said = chat.both(**options)
    assert (said.reasoning, said.content) == ("", "Yes.")


@pytest.mark.parametrize("options", ON)
def test_thinking_is_on(chat: Chat, options: dict[str, Any]):
    chat.answer("hm", "Yes.")
    assert chat.ask(**options).usage.prompt_tokens == prompt_length(chat)
    said = chat.both(**options)
    assert (said.reasoning, said.content) == ("hm", "Yes.")


def test_thoughts_of_earlier_turns_may_stay(chat: Chat):
    """Where the template has them: GLM-4.7's."""
    chat.answer("hm", "Yes.")
    turn = {"role": "assistant", "content": "No.", "reasoning_content": "a thought of before"}
    messages, prompts = [*HI, turn, *HI], set()
    for options in (
        {"thinking": {"type": "enabled", "clear_thinking": False}},
        {"chat_template_kwargs": {"clear_thinking": False}},
    ):
        prompts.add(chat.ask(messages=messages, **options).usage.prompt_tokens)
    assert prompts == {prompt_length(chat, messages, clear_thinking=False)}
    cleared = {"thinking": {"clear_thinking": True}}
    shown = chat.form is FORMS["glm47"]
    assert (chat.ask(messages=messages, **cleared).usage.prompt_tokens not in prompts) == shown


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_has_a_length(chat: Chat, budget: int):
    chat.say(chat.form.thought("abcdefghijklmnopqrstuvwxyz" * 4))
    for options in (
        {"max_thinking_tokens": budget},
        {"thinking": {"type": "enabled", "budget_tokens": budget}},
        {"reasoning": {"max_tokens": budget}},
    ):
        said = chat.both(max_tokens=40, **options)
        usage = chat.ask(max_tokens=40, **options).usage
        assert usage.completion_tokens_details.reasoning_tokens == budget
        assert len(said.reasoning) >= budget
        assert said.content
    chat.answer("hm", "Yes.")
    assert chat.both(max_thinking_tokens=5).reasoning == "hm"


def test_a_server_may_leave_thoughts_in_the_text(served: ServedModel):
    with chatting(replace(served, reasoning_parser="none")) as chat:
        chat.answer("hm", "Yes.")
        said = chat.both(separate_reasoning=True)
        assert (said.reasoning, said.content) == ("", "\n<think>hm</think>\nYes.")


@pytest.mark.parametrize("options", [{"max_thinking_tokens": -1}, {"thinking": {"type": "on"}}])
def test_what_thinking_cannot_be(chat: Chat, options: dict[str, Any]):
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(**options)
    assert (caught.value.param or "").split(".")[0] == next(iter(options))


def test_a_thought_that_is_cut_off(chat: Chat):
    chat.answer("a thought without an end", "Yes.")
    answers = [chat.both(max_tokens=length) for length in range(1, 14)]
    for said in answers:
        assert (said.content, said.finish) == ("", "length")
        assert "a thought without an end".startswith(said.reasoning)
    assert answers[-1].reasoning


def test_tokens_of_thoughts_are_counted(chat: Chat):
    chat.answer("", "Yes.")
    assert chat.ask().usage.completion_tokens_details.reasoning_tokens == 0
    tokenizer = chat.server.frontend.served.tokenizer
    for thought in ("hm", "a much longer thought"):
        chat.answer(thought, "Yes.")
        one, three = chat.ask().usage, chat.ask(n=3).usage
        count = len(tokenizer.encode(thought))
        assert one.completion_tokens_details.reasoning_tokens == count
        assert three.completion_tokens_details.reasoning_tokens == 3 * count
        assert three.completion_tokens == 3 * one.completion_tokens
        assert three.prompt_tokens == one.prompt_tokens


def test_several_choices(chat: Chat):
    chat.answer("hm", "Yes.")
    choices = chat.all(n=3)
    assert [(c.reasoning, c.content) for c in choices] == [("hm", "Yes.")] * 3


def test_every_token_has_its_log_probability_once(chat: Chat):
    call = chat.form.call("weather", city="Rome", days="3")
    chat.answer("hm, é", "On it. 🎉", call)
    said = chat.both(logprobs=True, top_logprobs=2, tools=[WEATHER])
    answer = chat.ask(logprobs=True, tools=[WEATHER])
    tokens = answer.choices[0].logprobs.content
    tokenizer, script = chat.server.frontend.served.tokenizer, chat.server.runner.script
    assert script
    assert [bytes(t.bytes) for t in tokens] == [tokenizer.token_bytes(i) for i in script]
    assert said.tokens == [(t.token, t.logprob) for t in tokens]
    assert len(said.tokens) == answer.usage.completion_tokens
    assert (said.reasoning, said.content, said.finish) == ("hm, é", "On it. 🎉", "tool_calls")


def test_stop_strings_are_of_the_text_only(chat: Chat):
    call = chat.form.call("weather", city="STOP", days="3")
    chat.answer("STOP here?", "On it.", call)
    said = chat.both(stop=["STOP"], tools=[WEATHER])
    assert (said.reasoning, said.content) == ("STOP here?", "On it.")
    assert said.arguments == [{"city": "STOP", "days": 3}]
    chat.answer("STOP here?", "Yes. STOP. No.")
    said = chat.both(stop=["STOP"])
    assert (said.reasoning, said.content, said.finish) == ("STOP here?", "Yes. ", "stop")
    chat.answer("hm", "ab", call)
    assert chat.both(stop=["abc"], tools=[WEATHER]).content == "ab"


def test_the_last_message_is_continued(chat: Chat):
    chat.say(" upon a time")
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    messages: list[Any] = []
    for more in ({}, {"reasoning_content": "A tale, then."}):
        messages = [*HI, {"role": "assistant", "content": "Once"} | more]
        said = chat.both(messages=messages, **options)
        assert (said.reasoning, said.content) == ("", " upon a time")
        prompt = prompt_length(chat, messages, **options)
        assert chat.ask(messages=messages, **options).usage.prompt_tokens == prompt
    chat.say("\n\n- a time")
    assert chat.both(messages=messages, **options).content == "\n\n- a time"
    with pytest.raises(openai.BadRequestError, match="continue_final_message: the last message"):
        chat.ask(**options)


# Thought first, then what was asked for


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    verdict: Literal["yes", "no"]
    sure: bool


def test_json_behind_a_thought(chat: Chat):
    schema = Verdict.model_json_schema()
    named = {"name": "verdict", "schema": schema, "strict": True}
    form = {"type": "json_schema", "json_schema": named}
    chat.answer('{"verdict": "maybe"', '{"verdict": "yes", "sure": false}')
    said = chat.both(response_format=form, max_tokens=100)
    assert said.reasoning == '{"verdict": "maybe"'
    assert said.content == '{"verdict": "yes", "sure": false}'
    chat.answer("hm", "Let me explain at length.")
    said = chat.both(response_format=form, max_tokens=100)
    assert (said.reasoning, said.finish) == ("hm", "stop")
    Verdict.model_validate_json(said.content)
    off = chat.both(response_format=form, max_tokens=100, enable_thinking=False)
    assert off.reasoning == ""
    Verdict.model_validate_json(off.content)


def test_the_clients_parser(chat: Chat):
    chat.answer("hm", '{"verdict": "no", "sure": true}')
    answer = chat.client.chat.completions.parse(
        model=chat.server.model, messages=HI, response_format=Verdict, max_tokens=100
    )
    message: Any = answer.choices[0].message
    assert message.parsed == Verdict(verdict="no", sure=True)
    assert message.reasoning_content == "hm"


def test_the_clients_stream(chat: Chat):
    chat.answer("hm", '{"verdict": "no", "sure": true}')
    options: dict[str, Any] = {"model": chat.server.model, "messages": HI, "max_tokens": 100}
    with chat.client.chat.completions.stream(response_format=Verdict, **options) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        message: Any = stream.get_final_completion().choices[0].message
    assert "".join(texts) == message.content
    assert message.parsed == Verdict(verdict="no", sure=True)
    assert message.reasoning_content == "hm"
    chat.say("Yes.")
    extra = {"enable_thinking": False}
    with chat.client.chat.completions.stream(extra_body=extra, **options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.reasoning_content, message.content) == (None, "Yes.")


def test_the_asynchronous_client(chat: Chat):
    chat.answer("a thought", "Yes.")

    async def main() -> None:
        url = f"{chat.server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            options: dict[str, Any] = {"model": chat.server.model, "messages": HI}
            whole: Any = await client.chat.completions.create(**options)
            message = whole.choices[0].message
            assert (message.reasoning_content, message.content) == ("a thought", "Yes.")
            stream: Any = await client.chat.completions.create(stream=True, **options)
            (said,) = streamed([chunk async for chunk in stream])
            assert (said.reasoning, said.content) == ("a thought", "Yes.")

    asyncio.run(main())


def test_what_was_said_may_be_sent_back(chat: Chat):
    """As the client's own object, and as JSON with all its nulls."""
    chat.answer("hm", "Yes.")
    message = chat.ask().choices[0].message
    expected = [*HI, {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}, *HI]
    for sent in (message, message.model_dump(), json.loads(message.model_dump_json())):
        messages = [*HI, sent, *HI]
        assert chat.both(messages=messages).content == "Yes."
        assert chat.ask(messages=messages).usage.prompt_tokens == prompt_length(chat, expected)


def test_the_line_break_before_an_answer_is_no_part_of_a_grammar(chat: Chat):
    for thinks in (True, False):
        text = f"{chat.form.thought('hm') if thinks else ''}{chat.form.text}yes"
        chat.say(text)
        options: dict[str, Any] = {"enable_thinking": thinks, "extra_body": {"choice": ["yes"]}}
        answer = chat.ask(temperature=0, **options)
        assert answer.choices[0].message.content == "yes"
        said = len(chat.server.frontend.served.tokenizer.encode(text)) + 1
        assert answer.usage.completion_tokens == said


def test_a_budget_does_not_end_what_shall_not_end(chat: Chat):
    chat.answer("hm", "Yes.")
    answer = chat.ask(max_tokens=40, ignore_eos=True, max_thinking_tokens=50)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 40)


def test_thoughts_in_the_text_are_not_cut_by_stop_strings(chat: Chat):
    chat.answer("a, b", "c, d")
    said = chat.both(separate_reasoning=False, stop=[", "])
    assert said.content.endswith("a, b</think>" + chat.form.text + "c")
    chat.say(chat.form.text + "c")
    assert chat.both(separate_reasoning=False, enable_thinking=False).content == "c"
