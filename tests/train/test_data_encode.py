"""What the model is trained to write is exactly what follows its prompt."""

from __future__ import annotations

import random

import pytest

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.encode import encode, render_prompt
from glmjax.train.data.mixture import TASKS, draw
from glmjax.train.data.packing import Packed, pack_batch
from glmjax.train.data.problem import Problem, Split
from glmjax.train.data.tokenizer import train_tokenizer
from glmjax.train.data.tool_text import score

TEMPLATE = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
SPLITS: tuple[Split, ...] = ("train", "held_out")
MAX_TOKENS = 480


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(seed=0, vocab_size=1024, conversations=1500))


def problems(task: str, count: int = 25) -> list[Problem]:
    rng = random.Random(7)
    return [draw(rng, split, task) for split in SPLITS for _ in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_trained_tokens_are_the_conversation(task: str, tokenizer: Tokenizer):
    for problem in problems(task):
        ids, trained = encode(problem, TEMPLATE, tokenizer)
        prompt = tokenizer.encode(render_prompt(problem, TEMPLATE))
        assert ids[: len(prompt)] == prompt
        assert all(trained[len(prompt) :])
        assert len(ids) == len(trained) <= MAX_TOKENS
        assert not trained[len(prompt) - 1]


@pytest.mark.parametrize("task", TASKS)
def test_only_the_turns_after_the_last_question_are_trained(task: str, tokenizer: Tokenizer):
    for problem in problems(task):
        ids, trained = encode(problem, TEMPLATE, tokenizer)
        text = tokenizer.decode((i for i, own in zip(ids, trained, strict=True) if own), False)
        turns = 2 if task == "tool_answer" else 1
        ends = [i for i, own in zip(ids, trained, strict=True) if own and i in _ends(tokenizer)]
        assert len(ends) == turns
        assert text.startswith("\n<think>") == problem.thinking
        assert ("</think>" in text) == problem.thinking
        assert text.endswith(
            "<|observation|>" if "tool_calls" in problem.messages[-1] else "<|user|>"
        )


def _ends(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.token_id(token) for token in ("<|user|>", "<|observation|>")}


@pytest.mark.parametrize("task", TASKS)
def test_the_gold_text_is_right_and_another_is_not(task: str, tokenizer: Tokenizer):
    for problem in problems(task):
        ids, _ = encode(problem, TEMPLATE, tokenizer)
        prompt = tokenizer.encode(render_prompt(problem, TEMPLATE))
        text = tokenizer.decode(ids[len(prompt) : -1])
        assert score(problem, text)
        assert not score(problem, text + "x")
        assert not score(problem, text[:-1])


@pytest.fixture(scope="module")
def packed(tokenizer: Tokenizer) -> Packed:
    return pack_batch(random.Random(3), "train", TEMPLATE, tokenizer, rows=16, seq_len=512)


def test_packed_arrays(packed: Packed):
    arrays = (packed.tokens, packed.segments, packed.positions, packed.trained)
    assert [str(array.dtype) for array in arrays] == ["int32", "int32", "int32", "bool"]
    assert {array.shape for array in arrays} == {(16, 512)}
    assert (packed.segments == 0).mean() < 0.05
    assert not packed.trained[packed.segments == 0].any()
    assert 0.1 < packed.trained.mean() < 0.5


def test_packed_conversations_are_whole(packed: Packed, tokenizer: Tokenizer):
    start = tokenizer.token_id("[gMASK]")
    for row in range(16):
        for segment in range(1, packed.segments[row].max() + 1):
            inside = packed.segments[row] == segment
            positions = packed.positions[row][inside].tolist()
            ids = packed.tokens[row][inside].tolist()
            assert positions == list(range(len(ids)))
            assert ids[0] == start
            assert ids[-1] in _ends(tokenizer)


def test_packing_is_deterministic(packed: Packed, tokenizer: Tokenizer):
    again = pack_batch(random.Random(3), "train", TEMPLATE, tokenizer, rows=16, seq_len=512)
    assert (again.tokens == packed.tokens).all()
    assert (again.trained == packed.trained).all()
