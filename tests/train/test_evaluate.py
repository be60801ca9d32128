"""What is measured was held out, and a server that cannot be asked is a clear message."""

from __future__ import annotations

import json
import random
import re

import pytest
from ports import free_ports

from convert.hf_to_orbax import convert
from glmjax.bench.synthetic import default_config, write_checkpoint
from glmjax.train.data.arithmetic import in_split
from glmjax.train.data.mixture import draw
from glmjax.train.data.problem import Problem
from glmjax.train.evaluate import MEASURES, Measure, calls_unseen, problems, table

TOOL_TASKS = ("tool_call", "tool_two", "tool_answer", "tool_none")


@pytest.mark.parametrize("name", MEASURES)
def test_problems_are_distinct_and_the_same_each_time(name: str):
    found = problems(MEASURES[name], 25, seed=0)
    assert len({json.dumps([p.messages, p.tools]) for p in found}) == len(found) == 25
    assert {problem.task for problem in found} == {MEASURES[name].task}
    assert problems(MEASURES[name], 25, seed=0) == found
    assert problems(MEASURES[name], 25, seed=1) != found


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
def test_problems_are_held_out_and_think_as_asked(name: str, thinking: bool):
    for problem in problems(Measure(name, thinking), 100, seed=0):
        assert problem.thinking == thinking
        first, second = map(int, re.findall(r"\d+", problem.messages[0]["content"]))
        a, b = max(first, second), min(first, second)
        assert in_split(name, a, b, "held_out")


def test_there_may_be_fewer_problems_than_asked_for():
    few = Measure("english", keep=lambda problem: "Hello" in problem.messages[0]["content"])
    assert 0 < len(problems(few, 100, seed=0)) < 100
    assert problems(Measure("add", keep=lambda problem: False), 3, seed=0) == []


def called(problem: Problem) -> set[str]:
    made = [call for message in problem.messages for call in message.get("tool_calls", [])]
    return {call["function"]["name"] for call in made}


def test_unseen_names_are_in_no_training_problem():
    rng = random.Random(4)
    training = [draw(rng, "train", task) for task in TOOL_TASKS for _ in range(1500)]
    seen = {tool["function"]["name"] for problem in training for tool in problem.tools}
    unseen = problems(Measure("tool_call", keep=calls_unseen), 200, seed=0)
    others = problems(Measure("tool_call", keep=lambda p: not calls_unseen(p)), 200, seed=0)
    assert len(unseen) == 200
    assert not seen & set().union(*map(called, unseen))
    assert seen & set().union(*map(called, others))
    assert not any(map(calls_unseen, training[: 3 * 1500]))


def test_every_call_must_be_unseen():
    def problem(*names: str) -> Problem:
        calls = [{"function": {"name": name, "arguments": {}}} for name in names]
        return Problem("tool_two", ({"role": "assistant", "tool_calls": calls},))

    new = next(iter(called(problems(Measure("tool_call", keep=calls_unseen), 1, seed=0)[0])))
    assert calls_unseen(problem(new, new))
    assert not calls_unseen(problem(new, "get_weather"))


def test_table():
    rows = [
        {"task": "add", "problems": 200, "right": 199, "wrong": []},
        {"task": "copy", "problems": 3, "right": 0, "wrong": []},
    ]
    assert table(rows).splitlines() == [
        "| task | right | problems | share |",
        "|---|---|---|---|",
        "| add | 199 | 200 | 99.5 % |",
        "| copy | 0 | 3 | 0.0 % |",
    ]


def test_a_server_that_is_not_there(run_command):
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = run_command("-m", "glmjax.train.evaluate", "--url", url, "--count", "2")
    assert done.returncode == 1
    assert re.search(rf"glmjax.train.evaluate: {url}: .*refused.*; is it serving\?", done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_served_model_is_measured(start_server, run_command, tmp_path):
    """A random model: it gets everything wrong."""
    write_checkpoint(tmp_path / "hf", default_config())
    convert(tmp_path / "hf", tmp_path / "model")
    rows = tmp_path / "rows.json"
    tasks = ("--task", "copy", "--task", "one call", "--count", "3")
    with start_server("--model", tmp_path / "model") as server:
        arguments = ("--url", server.url, *tasks, "--json", rows)
        done = run_command("-m", "glmjax.train.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    written = json.loads(rows.read_text("utf-8"))
    found = [(row["task"], row["problems"], row["right"]) for row in written]
    assert found == [("copy", 3, 0), ("one call", 3, 0)]
    assert all(len(row["wrong"]) == 3 for row in written)
    assert done.stdout.strip() == table(written)
