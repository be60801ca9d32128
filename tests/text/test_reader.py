"""Thought, text and calls, as they are read out of an answer while it is generated."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from spelling import (
    NANO,
    PLAIN,
    TAGGED,
    Chunks,
    bytes_of,
    marked,
    read,
    spelled,
)

from glmjax.server.served import ServedModel
from glmjax.text.detokenizer import Detokenizer
from glmjax.text.output import take_output
from glmjax.text.parts import (
    CallArguments,
    CallBegin,
    Content,
    Message,
    Part,
    Reasoning,
    ToolCall,
    joined,
    message,
)
from glmjax.text.reader import AnswerReader, Opening, Reading, TextReader
from glmjax.types import FinishReason, RequestOutput, TokenLogprobs

TOOLS: dict[str, Any] = {
    "f": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}},
    "ping": None,
}
READING = Reading(TOOLS)
RAW = Reading(TOOLS, separate_reasoning=False)
IN_THOUGHT = Opening(in_thought=True)
LENGTH = FinishReason.LENGTH
THOUGHT = "\n<think>hm</think>\n"
PING = "<tool_call>ping\n</tool_call>"


def tokens(text: str) -> list[int]:
    """Tags as their tokens, text byte by byte."""
    return spelled(*marked(text))


def call(name: str = "f", **values: str) -> str:
    pairs = [f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items()]
    return f"\n<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def parts_of(text: str, reading: Reading = READING, **options: Any) -> list[Part]:
    return read(tokens(text), reading, **options).parts


def message_of(text: str, reading: Reading = READING, **options: Any) -> Message:
    return message(parts_of(text, reading, **options))


# What must hold


ANSWERS = [
    f"{THOUGHT}hi{call(s='a<', n='12')}{call('g', x='[1]')}",
    f"{THOUGHT}{call(s='</arg')}",
    "<think></think>\nhi <tool_call> there",
]


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("end", [FinishReason.STOP, LENGTH])
def test_stream_and_whole_agree(text: str, end: FinishReason):
    for count in range(len(tokens(text))):
        ids = tokens(text)[:count]
        whole = read(ids, READING, end=end, steps=[len(ids) + 1])
        for size in range(1, 9):
            assert read(ids, READING, end=end, steps=[size]) == whole
        for first in range(1, count):
            assert read(ids, READING, end=end, steps=[first, count]) == whole


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel.load(NANO)


@pytest.mark.parametrize(
    ("prompt", "reasoning", "content"),
    [
        ("<|user|>\nhi<|assistant|>", "", "a</think>\nb"),
        ("<|user|>hi<|assistant|><think>", "a", "b"),
        ("<|user|>\nhi/nothink<|assistant|>\n<think></think>", "", "a</think>\nb"),
        ("<|assistant|><think><|user|>hi<|assistant|></think>", "", "a</think>\nb"),
        ("<|user|>hi<|assistant|><think>so far", "\n\na", "b"),
        ("<|user|>hi<|assistant|></think>\nSo far", "", "\n\na</think>\nb"),
    ],
)
def test_the_prompt_says_whether_the_answer_begins_in_a_thought(
    served: ServedModel, prompt: str, reasoning: str, content: str
):
    opening = served.opening(TAGGED.encode(prompt))
    assert message_of("\n\na</think>\nb", opening=opening) == Message(reasoning, content)


def test_nothing_of_the_format_leaks():
    for blank in ("", "\n", "\n\n", "\r\n"):
        text = f"{blank}<think>{blank}hm{blank}</think>{blank}hi{blank}{PING}{blank}"
        assert message_of(text) == Message("hm", "hi", [ToolCall("ping", "{}")])
    assert message_of(f"{THOUGHT}{call()}\n{call()}\n").content == ""
    assert message_of("\n<think>hm\n", opening=IN_THOUGHT).reasoning == "hm"
    assert message_of("\n<think></think>\n\nhi") == Message("", "hi")
    assert message_of("\n  - hi").content == "  - hi"


def test_without_the_end_of_a_thought():
    assert message_of("the answer") == Message("", "the answer")
    assert message_of("\n<think>a thought\n") == Message("a thought")
    assert message_of("a thought", opening=IN_THOUGHT) == Message("a thought")
    assert parts_of("<think>a thought", Reading(stream_reasoning=False)) == [Reasoning("a thought")]


def test_a_call_in_a_thought_is_thought():
    text = f"hm {PING} so"
    assert message_of(f"<think>{text}</think>{PING}") == Message(text, "", [ToolCall("ping", "{}")])
    letters = [*tokens("<think>a"), *bytes_of("</think>"), *tokens("b</think>c")]
    assert read(letters, READING).message == Message("a</think>b", "c")


@pytest.mark.parametrize(
    "value", ["a<", "</", "a</arg", '"', "\\", "{}", "\n", " x\n", "a</arg_key>\n<think>b", "🎉"]
)
def test_argument_values_survive(value: str):
    (found,) = message_of(call(s=value)).calls
    assert json.loads(found.arguments) == {"s": value}
    ids = [
        *tokens("<tool_call>f<arg_key>s</arg_key><arg_value>"),
        *bytes_of(value + "</arg_value>"),
    ]
    (found,) = read([*ids, *tokens("</arg_value></tool_call>")], READING).message.calls
    assert json.loads(found.arguments) == {"s": value + "</arg_value>"}


def test_arguments_are_typed_by_the_schema():
    tools: dict[str, Any] = {
        "f": {
            "properties": {"a": {"$ref": "#/$defs/word"}, "b": {"type": "integer"}, "c": {}},
            "$defs": {"word": {"type": "string"}},
        }
    }
    (found,) = message_of(call(a="123", b="123", c="x y"), Reading(tools)).calls
    assert json.loads(found.arguments) == {"a": "123", "b": 123, "c": "x y"}


def test_a_name_comes_whole_and_arguments_add_up_to_json():
    ids = tokens(f"hi{call(s='ab', n='12')}{PING}")
    reader = AnswerReader(TAGGED, READING, Opening())
    parts = [part for i in ids for part in reader.push(i)] + reader.finish(False)
    begun = [part for part in parts if isinstance(part, CallBegin)]
    assert begun == [CallBegin(0, "f"), CallBegin(1, "ping")]
    pieces = [
        [p.text for p in parts if isinstance(p, CallArguments) and p.call == i] for i in (0, 1)
    ]
    assert pieces == [['{"s": "', "a", "b", '"', ', "n": 12', "}"], ["{}"]]


def test_two_calls_in_one_step_and_a_cut_in_the_middle_of_a_call():
    ids = tokens(f"{call(s='a')}{call('ping')}")
    expected = [ToolCall("f", '{"s": "a"}'), ToolCall("ping", "{}")]
    assert read(ids, READING, steps=[len(ids)]).message.calls == expected
    cut = read(tokens("a\n<tool_call>f\n<arg_key>s</arg_key><arg_value>b"), READING, end=LENGTH)
    assert cut.message == Message("", "a", [ToolCall("f", '{"s": "b"}')])
    assert cut.end is LENGTH
    assert message_of("a\n<tool_call>pi", end=LENGTH) == Message("", "a")
    assert message_of("a\n<tool_call>I w", end=LENGTH) == Message("", "a\n<tool_call>I w")


def test_unknown_tools_are_passed_on():
    for reading in (READING, Reading({}), Reading({}, stream_reasoning=False)):
        assert message_of(call("g", x="1", y="a"), reading).calls == [
            ToolCall("g", '{"x": 1, "y": "a"}')
        ]


# What else there is


def test_the_order_of_parts():
    assert parts_of(f"{THOUGHT}a\n{PING}\nb {PING}c") == [
        Reasoning("hm"),
        Content("a"),
        CallBegin(0, "ping"),
        CallArguments(0, "{}"),
        Content("\nb"),
        CallBegin(1, "ping"),
        CallArguments(1, "{}"),
        Content("\nc"),
    ]


def test_broken_calls_are_text_and_do_not_count():
    text = f'a\n<tool_call>{{"name": "f"}}</tool_call>\n{PING}'
    assert message_of(text) == Message(
        "", 'a\n<tool_call>{"name": "f"}</tool_call>', [ToolCall("ping", "{}")]
    )
    assert parts_of(text)[1] == CallBegin(0, "ping")
    assert message_of(f"<tool_call>\n{PING}") == Message(
        "", "<tool_call>", [ToolCall("ping", "{}")]
    )


def test_stray_tags_are_text():
    text = "a</think><think>b</tool_call><arg_key>c</arg_value>"
    assert message_of(text) == Message("", text)
    assert message_of(f"hi{PING}", Reading()) == Message("", f"hi{PING}")


def test_thoughts_may_follow_each_other():
    assert message_of("<think>a </think>\n<think> b</think></think>\nc") == Message("ab", "c")
    assert message_of("<think>\n<think>a<think></think>b") == Message("a<think>", "b")
    assert message_of("\n</think>\n<think>a</think>b") == Message("a", "b")


def test_thoughts_that_are_not_separate_are_text_as_they_stand():
    text = "\n<think>\nhm </think>\n\n</think><think></think> \nso \n"
    assert message_of(text, RAW) == Message("", text)
    assert message_of(f"{text}{PING}", RAW) == Message("", text.rstrip(), [ToolCall("ping", "{}")])
    assert message_of(f"<think>{PING}", RAW) == Message("", f"<think>{PING}")
    assert read(tokens("<think>ab</think>c"), RAW).reasoning_tokens == 2


def test_a_thought_comes_as_it_arrives_or_whole():
    ids = tokens("<think>ab c</think>d")
    for stream, expected in ((True, ["a", "b", " c"]), (False, ["ab c"])):
        reader = AnswerReader(TAGGED, Reading(stream_reasoning=stream), Opening())
        parts = [part for i in ids for part in reader.push(i)]
        assert parts == [*map(Reasoning, expected), Content("d")]


def test_with_one_call_at_most_the_answer_ends_with_it():
    got = read(tokens(f"a{PING}b{PING}"), Reading(TOOLS, parallel=False), end=LENGTH, steps=[99])
    assert got.message == Message("", "a", [ToolCall("ping", "{}")])
    assert (got.end, got.matched) == (FinishReason.STOP, None)
    assert got.token_ids == tokens(f"a{PING}")
    cut = read(tokens("<tool_call>ping\n"), Reading(TOOLS, parallel=False), end=LENGTH)
    assert (cut.message.calls, cut.end) == ([ToolCall("ping", "{}")], LENGTH)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a b", " ", ("", "a", " ")),
        (" a", " ", ("", "", " ")),
        ("a  b", "b", ("", "a  ", "b")),
        ("<think>xy</think>\n\nay", "y", ("xy", "a", "y")),
        ("<think>a</think>\n\nb", "\n", ("a", "b", None)),
        (f"{call(s='xy')}ay", "y", ("", "a", "y")),
        (f"a{PING}b", "ab", ("", "a\nb", None)),
        ("\n \na", "\n", ("", "a", None)),
        (" \n a", " ", ("", "", " ")),
        ("<tool_call>no call", "call", ("", "<tool_", "call")),
        ("a<tool_call>no call", "no", ("", "a<tool_call>", "no")),
        ("ab", "bc", ("", "ab", None)),
    ],
)
def test_stop_strings_end_the_text(text: str, stop: str, expected: tuple[str, str, str | None]):
    for size in (1, 99):
        got = read(tokens(text), READING, stops=[stop], end=LENGTH, steps=[size])
        assert (got.message.reasoning, got.message.content, got.matched) == expected
        assert got.end is (LENGTH if got.matched is None else FinishReason.STOP)


def test_nothing_but_white_space():
    assert message_of("\n\n") == Message()
    assert message_of("\n ") == Message()
    assert message_of(" \n  a") == Message("", "  a")
    assert message_of(f"{PING} \n") == Message("", "", [ToolCall("ping", "{}")])
    assert message_of("<think>\n </think>\n") == Message()
    assert message_of("<think></think>\n \n", RAW).content == "<think></think>"
    assert message_of("\n \na", RAW).content == "a"
    assert message_of("a \n") == Message("", "a \n")


def test_text_alone():
    reader = TextReader(Detokenizer(TAGGED, ["b"]))
    parts = [part for i in tokens("<think>ab") for part in reader.push(i)]
    assert joined(parts) == [Content("<think>a")]
    assert (reader.ended, reader.matched, reader.reasoning_tokens) == (True, "b", 0)
    reader = TextReader(Detokenizer(TAGGED, ["bc"]))
    assert joined([part for i in tokens("ab") for part in reader.push(i)]) == [Content("a")]
    assert (reader.finish(False), reader.ended) == ([Content("b")], False)


def test_outputs_of_an_engine():
    """The token that ended a request is no text; and what comes behind a stop string is dropped."""
    ids = tuple(tokens("ab"))
    logprobs = tuple(TokenLogprobs(-1.0 * i, ()) for i in ids)
    ended = RequestOutput("r", ids, FinishReason.STOP, ids[-1], 1, 2, 0, logprobs)
    delta = take_output(AnswerReader(TAGGED, READING, Opening()), ended)
    assert (delta.parts, delta.token_ids) == ((Content("a"),), ids)
    assert (delta.finish_reason, delta.matched) == (FinishReason.STOP, ids[-1])
    assert (delta.logprobs, delta.text) == (logprobs, "a")
    stopped = take_output(AnswerReader(TAGGED, READING, Opening(), ["a"]), ended)
    assert stopped == ((), ids[:1], FinishReason.STOP, "a", logprobs[:1])
    aborted = RequestOutput("r", tuple(tokens("<tool_call>pi")), FinishReason.ABORT, None, 1, 3, 0)
    assert take_output(AnswerReader(TAGGED, READING, Opening()), aborted).parts == ()
    chunks = Chunks(TAGGED)
    half = RequestOutput("r", (chunks.learn(b"ba\xf0"),), LENGTH, None, 1, 1, 0)
    for reader in (
        TextReader(Detokenizer(chunks, ["a"])),
        AnswerReader(chunks, READING, Opening(), ["a"]),
    ):
        assert take_output(reader, half)[:1] == ((Content("b"),),)


def test_parts_put_together():
    parts = [Reasoning("a"), Content("b"), CallBegin(0, "f"), CallBegin(1, "g")]
    parts += [CallArguments(1, "{"), CallArguments(0, "{}"), CallArguments(1, "}"), Content("c")]
    expected = Message("a", "bc", [ToolCall("f", "{}"), ToolCall("g", "{}")])
    assert message([*parts, Reasoning("")]) == message(joined(parts)) == expected
    assert joined(parts) == parts
    assert joined([Content("a"), Content("b"), Reasoning("c"), Content("d")]) == [
        Content("ab"),
        Reasoning("c"),
        Content("d"),
    ]


# However long it is

LETTERS = "<tool_call>f\n<arg_key>n</arg_key><arg_value>"
LONG = {
    "text": ("", "x" * 60, READING),
    "blanks": ("", " " * 60, READING),
    "blanks behind text": ("a", " " * 60, READING),
    "blanks in a thought": ("<think>a", " " * 60, READING),
    "a thought": ("<think>", "x" * 60, READING),
    "a thought that comes whole": ("<think>", "x" * 60, Reading(stream_reasoning=False)),
    "a thought that is text": ("<think>", "x" * 60, RAW),
    "a header": ("<tool_call>", "x" * 60, READING),
    "a header of blanks": ("<tool_call>", " " * 60, READING),
    "a header of more than a name": ("<tool_call>f", " " * 60, READING),
    "behind a name": ("<tool_call>f\n", "x" * 60, READING),
    "a key": ("<tool_call>f<arg_key>", "x" * 60, READING),
    "a string": (LETTERS.replace("n<", "s<"), "x" * 60, READING),
    "a number": (LETTERS, "1" * 60, READING),
    "behind an open value": (LETTERS + "</tool_call>", " " * 60, READING),
    "tags": ("a", "<tool_call", READING),
}


def allocated(reader: AnswerReader, ids: list[int]) -> int:
    """Bytes that were allocated at once while a token was read, over all of them."""
    tracemalloc.start()
    total = 0
    try:
        for token_id in ids:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            reader.push(token_id)
            total += tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return total


@pytest.mark.parametrize(("begin", "more", "reading"), LONG.values(), ids=LONG)
@pytest.mark.parametrize("base", [TAGGED, PLAIN], ids=["tokens", "letters"])
def test_work_for_a_token_does_not_grow_with_the_length(
    base: Any, begin: str, more: str, reading: Reading
):
    """What a step builds anew it has to allocate, so bytes stand for work."""
    chunks, count = Chunks(base), 1500
    reader = AnswerReader(chunks, reading, Opening(), ["x" * 100 + "y"])
    ids = [*base.encode(begin), *[chunks.learn(more)] * count]
    assert allocated(reader, ids) < 5000 * count  # the text's length is 90,000, in the end
