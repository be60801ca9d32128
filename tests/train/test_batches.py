"""Batches are a pure function of recipe and step, and never show what is held out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from glmjax.text.tokenizer import Tokenizer
from glmjax.train.batches import Batches
from glmjax.train.data import tools
from glmjax.train.data.arithmetic import OPERATIONS, in_split
from glmjax.train.data.encode import prompt_messages
from glmjax.train.data.english import wordings
from glmjax.train.data.english_tables import QUESTIONS
from glmjax.train.data.mixture import draw
from glmjax.train.data.packing import Packed
from glmjax.train.data.problem import Problem, Split
from glmjax.train.data.tokenizer import train_tokenizer
from glmjax.train.recipe import Recipe, read_recipe

TINY = Path(__file__).with_name("tiny.toml")
SPLITS: tuple[Split, ...] = ("train", "held_out")
# Tasks with so few prompts that draws which are not kept apart share some.
SMALL_TASKS = ("add", "subtract", "multiply", "add_direct", "upper", "english")
USER = re.compile(r"<\|user\|>\n([^<]*?)(?:/nothink)?<")


def sum_pattern(wording: str) -> re.Pattern[str]:
    return re.compile(re.escape(wording).replace(r"\{", "(?P<").replace(r"\}", r">\d+)"))


SUMS = [(name, sum_pattern(text)) for name, o in OPERATIONS.items() for text in o.wordings]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe(TINY)


@pytest.fixture(scope="module")
def tokenizer(recipe: Recipe) -> Backend:
    return train_tokenizer(recipe.seed, recipe.tokenizer.vocab_size, recipe.tokenizer.conversations)


@pytest.fixture(scope="module")
def batches(recipe: Recipe, tokenizer: Backend) -> Batches:
    return Batches(recipe, tokenizer)


def data(packed: Packed) -> list[bytes]:
    return [array.tobytes() for array in astuple(packed)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_has_one_batch(batches, recipe, tokenizer, split):
    drawn = [data(batches.at(step, split)) for step in (0, 3, 4)]
    again = Batches(recipe, tokenizer)
    assert [data(again.at(step, split)) for step in (4, 3, 0)] == drawn[::-1]


def test_steps_splits_and_seeds_differ(batches, recipe, tokenizer):
    reseeded = Batches(replace(recipe, seed=recipe.seed + 1), tokenizer)
    drawn = [b.at(step, s) for b in (batches, reseeded) for step in range(2) for s in SPLITS]
    assert len({batch.tokens.tobytes() for batch in drawn}) == len(drawn) == 8


def test_shapes_follow_the_stages(recipe, tokenizer):
    first, second = recipe.stages
    longer = replace(recipe, stages=(first, replace(second, rows=2, seq_len=384)))
    batches = Batches(longer, tokenizer)
    shapes = [batches.at(step).tokens.shape for step in range(6)]
    assert shapes == [(4, 128)] * 4 + [(2, 384)] * 2


def test_a_joined_row_is_one_text(batches, recipe, tokenizer):
    stages = tuple(replace(stage, joined=False) for stage in recipe.stages)
    apart, joined = Batches(replace(recipe, stages=stages), tokenizer).at(4), batches.at(4)
    assert apart.segments.max() > 1
    np.testing.assert_array_equal(joined.tokens, apart.tokens)
    np.testing.assert_array_equal(joined.trained, apart.trained)
    np.testing.assert_array_equal(joined.segments, apart.segments > 0)
    np.testing.assert_array_equal(joined.positions, np.tile(np.arange(128), (4, 1)))
    assert [str(array.dtype) for array in astuple(joined)] == ["int32", "int32", "int32", "bool"]


def test_a_stage_may_weigh_the_tasks_itself(recipe, tokenizer):
    stage = replace(recipe.stages[0], tasks={"add_direct": 1.0})
    rows = Batches(replace(recipe, stages=(stage,)), tokenizer).at(0).tokens
    decode = Tokenizer(tokenizer).decode
    asked = [text for row in rows for text in USER.findall(decode(row.tolist(), False))]
    assert len(asked) >= len(rows)
    assert all(map(sums, asked))


@pytest.mark.parametrize("split", SPLITS)
def test_batches_hold_sums_of_their_split(recipe, tokenizer, split):
    long = replace(recipe, stages=(replace(recipe.stages[0], steps=20, seq_len=256),))
    batches, decode = Batches(long, tokenizer), Tokenizer(tokenizer).decode
    rows = [row.tolist() for step in range(20) for row in batches.at(step, split).tokens]
    asked = [text for row in rows for text in USER.findall(decode(row, False))]
    found = set().union(*map(sums, asked))
    assert len(found) > 50
    assert all(in_split(name, high, low, split) for name, low, high in found)


def sums(text: str) -> set[tuple[str, int, int]]:
    """The operation and its operands, the smaller one first, if `text` asks for one."""
    matches = [(name, pattern.fullmatch(text)) for name, pattern in SUMS]
    return {(name, *sorted((int(m["a"]), int(m["b"])))) for name, m in matches if m}


def user_texts(problem: Problem) -> list[str]:
    return [message["content"] for message in problem.messages if message["role"] == "user"]


def problem_sums(problem: Problem) -> set:
    return set().union(*map(sums, user_texts(problem)))


def plain(text: str) -> str:
    return text.rstrip("?.!").lower()


WORDINGS = {plain(text) for q in QUESTIONS for split in SPLITS for text in wordings(q, split)}


def problem_wordings(problem: Problem) -> set:
    return WORDINGS.intersection(map(plain, user_texts(problem)))


def made_up_names(problem: Problem) -> set:
    names = {tool["function"]["name"] for tool in problem.tools}
    return {name for name in names if not tools.READABLE.intersection(name.split("_"))}


def calls(problem: Problem) -> set:
    made = [call["function"] for m in problem.messages for call in m.get("tool_calls", [])]
    return {json.dumps([call["name"], call["arguments"]]) for call in made}


@cache
def drawn(split: Split, seed: int, count: int, task: str | None = None) -> list[Problem]:
    rng = random.Random(seed)
    return [draw(rng, split, task) for _ in range(count)]


@pytest.mark.parametrize("items", [problem_sums, problem_wordings, made_up_names, calls])
def test_held_out_items_are_in_no_training_problem(items: Callable[[Problem], set]):
    """Of any task. Two draws for training do share items, so chance does not keep them apart."""

    def found(split: Split, seed: int, count: int) -> set:
        return set().union(*map(items, drawn(split, seed, count)))

    train, more = found("train", 0, 4000), found("train", 1, 1000)
    held_out = found("held_out", 2, 1000)
    assert len(train & more) > 10
    assert len(held_out) > 20
    assert not train & held_out


@pytest.mark.parametrize("task", SMALL_TASKS)
def test_held_out_prompts_are_in_no_training_problem(task: str):
    def prompts(split: Split, seed: int) -> set[str]:
        return {json.dumps(prompt_messages(p)) for p in drawn(split, seed, 1500, task)}

    train = prompts("train", 0)
    assert train & prompts("train", 1)
    assert not train & prompts("held_out", 2)
