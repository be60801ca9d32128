"""Each generator's answers are right, and what is held out stays out of training."""

from __future__ import annotations

import json
import random

import pytest

from glmjax.train.data import arithmetic, english, lines
from glmjax.train.data.english_tables import QUESTIONS
from glmjax.train.data.mixture import TASKS, draw
from glmjax.train.data.problem import Problem
from glmjax.train.data.splits import redraw, split_of
from glmjax.train.data.tool_text import parse_calls, score

ADDITION = """1284+7930
1+7+0=08 8
2+9+0=11 18
8+3+1=12 218
4+0+1=05 5218"""
MULTIPLICATION = """284*7
2*7+0=14 4
8*7+1=57 74
4*7+5=33 374
0*7+3=03 3374"""
SUBTRACTION = """3001-8990
3-8-0=15 5
0-9-1=10 05
0-9-1=10 005
1-0-1=00 0005"""


def some(task: str, count: int = 200) -> list[Problem]:
    rng = random.Random(11)
    return [draw(rng, "train", task) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "a", "b", "steps"),
    [
        ("add", 4821, 397, ADDITION),
        ("multiply", 482, 7, MULTIPLICATION),
        ("subtract", 1003, 998, SUBTRACTION),
        ("add", 7, 5, "7+5\n7+5+0=12 2\n0+0+1=01 12"),
    ],
)
def test_steps(name: str, a: int, b: int, steps: str):
    assert arithmetic.steps(name, a, b) == steps


@pytest.mark.parametrize("name", arithmetic.OPERATIONS)
def test_steps_end_in_the_result(name: str):
    rng = random.Random(2)
    for _ in range(300):
        a, b = rng.randint(0, 9999), rng.randint(0, 9 if name == "multiply" else 9999)
        a, b = max(a, b), min(a, b)
        last = arithmetic.steps(name, a, b).split(" ")[-1]
        assert int(last) == arithmetic.result(name, a, b)


def test_weights():
    assert sum(weight for weight, _ in TASKS.values()) == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_problems(task: str):
    first, second = some(task, 20), some(task, 20)
    assert first == second
    assert all(problem.task == task for problem in first)
    assert all(problem.messages[-1]["role"] == "assistant" for problem in first)


def test_splits_never_meet():
    keys = [f"{n}+{n}" for n in range(1000)]
    assert 50 < sum(split_of(key) == "held_out" for key in keys) < 200
    rng = random.Random(0)
    assert all(
        split_of(redraw("held_out", lambda: str(rng.random()), str)) == "held_out"
        for _ in range(20)
    )


def test_held_out_sums_are_in_no_training_problem():
    rng = random.Random(1)
    for _ in range(300):
        problem = draw(rng, "train", "add")
        first, second = problem.messages[-1]["reasoning_content"].split("\n")[0].split("+")
        key = arithmetic.key("add", int(first[::-1]), int(second[::-1]))
        assert split_of(key) == "train"


def test_english_keeps_one_wording_of_each_question_held_out():
    trained = {_plain(w): q.answer for q in QUESTIONS for w in english.wordings(q, "train")}
    held_out = [_plain(w) for q in QUESTIONS for w in english.wordings(q, "held_out")]
    assert len(trained) == sum(len(english.wordings(q, "train")) for q in QUESTIONS)
    assert len(held_out) == len(QUESTIONS)
    assert not trained.keys() & set(held_out)
    assert all(len(english.wordings(q, "train")) >= 5 for q in QUESTIONS)


def _plain(text: str) -> str:
    return text.rstrip("?.!").lower()


def test_counts_are_right():
    rng = random.Random(3)
    for _ in range(200):
        exchange = lines.exchange(rng, "train", "count", thinking=True)
        assert exchange.answer in exchange.thought
        assert 0 <= int(exchange.answer) <= lines.MAX_COUNT


def test_facts_hold_the_answer():
    for problem in some("facts"):
        system, question, gold = problem.messages[0], problem.messages[-2], problem.messages[-1]
        assert gold["content"] in system["content"]
        assert question["role"] == "user"
        assert gold.get("reasoning_content", "") in system["content"]


@pytest.mark.parametrize("task", ["tool_call", "tool_two", "tool_answer"])
def test_calls_follow_their_schema(task: str):
    for problem in some(task):
        schemas = {tool["function"]["name"]: tool["function"] for tool in problem.tools}
        user, called = problem.messages[:2]
        assert len(called["tool_calls"]) == (2 if task == "tool_two" else 1)
        for call in called["tool_calls"]:
            arguments = call["function"]["arguments"]
            shape = schemas[call["function"]["name"]]["parameters"]
            assert list(arguments) == shape["required"] == list(shape["properties"])
            for key, value in arguments.items():
                _check_value(shape["properties"][key], value, user["content"])


def _check_value(schema: dict, value: object, asked: str) -> None:
    types = {"string": str, "integer": int, "boolean": bool}
    assert type(value) is types[schema["type"]]
    assert value in schema.get("enum", [value])
    assert isinstance(value, bool) or str(value) in asked


def test_some_calls_have_no_arguments():
    calls = [p.messages[1]["tool_calls"][0]["function"] for p in some("tool_call", 400)]
    assert sum(not call["arguments"] for call in calls) >= 40


CALL = "\n<tool_call>zori\n<arg_key>n</arg_key>\n<arg_value>42</arg_value>\n</tool_call>"


def test_parse_calls():
    none = "\n<tool_call>mek_tal\n</tool_call>"
    assert parse_calls(CALL + none) == [("zori", {"n": "42"}), ("mek_tal", {})]
    assert parse_calls("\nSure." + CALL) == [("zori", {"n": "42"})]
    assert parse_calls("no call") == []


@pytest.mark.parametrize(
    "text",
    [
        CALL + "\n",
        CALL.replace("</tool_call>", ""),
        CALL.replace("\n<arg_value>", "<arg_value>"),
        CALL.replace("\n<arg_key>n</arg_key>\n<arg_value>42</arg_value>", "\nn: 42"),
        CALL.replace(
            "</arg_value>", "</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>"
        ),
    ],
)
def test_parse_calls_is_strict(text: str):
    assert parse_calls(text) == []


@pytest.mark.parametrize("arguments", [{"n": 42}, json.dumps({"n": 42})])
def test_score_of_calls(arguments: object):
    function = {"name": "zori", "arguments": arguments}
    gold = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    problem = Problem("tool_call", ({"role": "user", "content": "x"}, gold))
    assert score(problem, CALL)
    assert score(problem, "\n<think>n -> zori</think>" + CALL)
    assert not score(problem, CALL + CALL)
    assert not score(problem, "\nSure." + CALL)
    assert not score(problem, CALL.replace("42", "042"))
    assert not score(problem, CALL.replace(">n<", ">m<"))
    assert not score(problem, "\n42")


def test_score_of_text():
    problem = Problem(
        "add", ({"role": "user", "content": "x"}, {"role": "assistant", "content": "7"})
    )
    assert score(problem, "\n<think>3+4</think>\n7")
    assert score(problem, "\n7")
    assert not score(problem, "\n<think>7")
    assert not score(problem, "\n7" + CALL)
