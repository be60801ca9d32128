"""glmjax.LLM with chat messages: thoughts, text and calls, taken apart as the servers do."""

from __future__ import annotations

from typing import Any

import pytest
from live import PacedRunner, make_engine

import glmjax.llm
from glmjax.errors import InvalidRequestError
from glmjax.llm import LLM, Completion
from glmjax.server.served import ServedModel
from glmjax.text.parts import Message, ToolCall
from glmjax.types import FinishReason

HI = [{"role": "user", "content": "hi"}]
THOUGHT = "\n<think>step one.\n\nstep two</think>"
CALL = "\n<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>1234</arg_value>\n</tool_call>"


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters} | fields}


@pytest.fixture
def parts(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, PacedRunner]:
    engine, runner = make_engine(served)
    monkeypatch.setattr(glmjax.llm, "build", lambda *_, **__: (engine, served))
    return LLM(served.folder), runner


def answer(parts: tuple[LLM, PacedRunner], text: str, **options: Any) -> Completion:
    """What the model makes of saying `text`."""
    llm, runner = parts
    runner.script = [*llm.served.tokenizer.encode(text), llm.served.eos_token_ids[0]]
    done = llm.generate(HI, **({"temperature": 0, "max_new_tokens": 200} | options))
    assert isinstance(done, Completion)
    return done


def test_an_answer_in_parts(parts):
    done = answer(parts, f"{THOUGHT}\nso{CALL}", tools=[tool()])
    assert done.message == Message("step one.\n\nstep two", "so", [ToolCall("f", '{"n": 1234}')])
    assert done.text == f"{THOUGHT}\nso{CALL}"
    assert done.finish_reason is FinishReason.STOP
    plain = answer(parts, CALL)  # no tools: it is text
    assert plain.message == Message("", CALL.lstrip())


@pytest.mark.parametrize(
    ("stop", "text", "content"),
    [
        ("\n\n", f"{THOUGHT}\none", "one"),
        ("23", f"{THOUGHT}\none", "one"),
        ("ne", f"{THOUGHT}\no", "o"),
    ],
)
def test_stop_strings_end_the_text_alone(parts, stop: str, text: str, content: str):
    done = answer(parts, f"{THOUGHT}\none{CALL}", stop=stop, tools=[tool()])
    assert done.message is not None
    assert (done.message.reasoning, done.message.content) == ("step one.\n\nstep two", content)
    assert done.text == (text if content == "o" else text + CALL)
    assert [call.arguments for call in done.message.calls] == ['{"n": 1234}'] * (content == "one")


def test_what_is_cut_off(parts):
    cut = THOUGHT + CALL[: CALL.index("1234")]
    count = len(parts[0].served.tokenizer.encode(cut)) + 1
    done = answer(parts, THOUGHT + CALL, tools=[tool()], max_new_tokens=count)
    assert done.finish_reason is FinishReason.LENGTH
    assert done.message is not None
    assert done.message.calls == [ToolCall("f", "{}")]


def test_strict_tools_hold_the_model_to_them(parts):
    wrong = THOUGHT + CALL.replace("<arg_key>n", "<arg_key>m")
    loose, strict = (answer(parts, wrong, tools=[tool(strict=s)]) for s in (False, True))
    assert loose.message is not None
    assert loose.message.calls == [ToolCall("f", '{"m": 1234}')]
    assert strict.message is not None
    assert '"m"' not in str(strict.message.calls)


def test_json_or_a_call(parts):
    options: dict[str, Any] = {"tools": [tool()], "json_schema": {"type": "integer"}}
    called = answer(parts, THOUGHT + CALL, **options)
    assert called.message is not None
    assert called.message.calls == [ToolCall("f", '{"n": 1234}')]
    told = answer(parts, f"{THOUGHT}\n7", **options)
    assert told.message == Message("step one.\n\nstep two", "7")


@pytest.mark.parametrize(
    ("prompts", "tools", "words"),
    [
        ("hi", [tool()], "chat messages only"),
        ([HI, [1, 2]], [tool()], "chat messages only"),
        (HI, [{"type": "web_search"}], "web_search"),
    ],
)
def test_tools_that_cannot_be(parts, prompts: Any, tools: list[Any], words: str):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        parts[0].generate(prompts, tools=tools)
    assert caught.value.param == "tools"
    assert parts[1].launched == 0
