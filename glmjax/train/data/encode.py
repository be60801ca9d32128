"""Conversations to token ids, and which of these the model has to write itself."""

from __future__ import annotations

from collections.abc import Sequence

from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.problem import Message, Problem

ASSISTANT, USER, OBSERVATION = "<|assistant|>", "<|user|>", "<|observation|>"
THINK_END = "</think>"


def render(problem: Problem, template: ChatTemplate) -> str:
    """The whole conversation, closed by the token that ends the model's last turn."""
    text = template.render(
        problem.messages,
        add_generation_prompt=False,
        enable_thinking=problem.thinking,
        tools=list(problem.tools) or None,
    )
    return text + (OBSERVATION if problem.messages[-1].get("tool_calls") else USER)


def render_prompt(problem: Problem, template: ChatTemplate) -> str:
    """What the model is given before its last turn."""
    return template.render(
        prompt_messages(problem),
        add_generation_prompt=True,
        enable_thinking=problem.thinking,
        tools=list(problem.tools) or None,
    )


def prompt_messages(problem: Problem) -> tuple[Message, ...]:
    """The messages before the answer."""
    return problem.messages[:-1]


def encode(
    problem: Problem, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation and, for each, whether it is the model's to write."""
    return encode_batch([problem], template, tokenizer)[0]


def encode_batch(
    problems: Sequence[Problem], template: ChatTemplate, tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """`encode` of each problem; the faster way for many."""
    encoded = tokenizer.encode_batch([render(problem, template) for problem in problems])
    return [
        (ids, _trained(ids, problem.thinking, tokenizer))
        for problem, ids in zip(problems, encoded, strict=True)
    ]


def _trained(ids: list[int], thinking: bool, tokenizer: Tokenizer) -> list[bool]:
    """True in the assistant's turns after the last question, up to the token that ends each.

    Earlier turns are shown without their thoughts, so they are no example of what to write.
    Without thinking, the empty thought is given to the model.
    """
    assistant, user, observation, think_end = map(
        tokenizer.token_id, (ASSISTANT, USER, OBSERVATION, THINK_END)
    )
    trained = [False] * len(ids)
    at = _last(ids, user, len(ids) - 1)
    while assistant in ids[at:]:
        start = ids.index(assistant if thinking else think_end, ids.index(assistant, at)) + 1
        at = next(i for i in range(start, len(ids)) if ids[i] in (user, observation)) + 1
        trained[start:at] = [True] * (at - start)
    return trained


def _last(ids: list[int], token: int, end: int) -> int:
    """Index of the last `token` before `end`."""
    return end - 1 - ids[:end][::-1].index(token)
