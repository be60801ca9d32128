"""Questions about glmjax and small talk, in plain English; each keeps one wording held out."""

from __future__ import annotations

import random
import zlib

from glmjax.train.data.english_tables import FRAMES, QUESTIONS, Question
from glmjax.train.data.problem import Exchange, Problem, Split, conversation

CARELESS = 0.2


def wordings(question: Question, split: Split) -> list[str]:
    """The wordings of a question in a split: one is held out, all others are trained on.

    The first, which people use most, is never the one held out.
    """
    frames = FRAMES[question.frame] if question.frame else ()
    framed = [frame.format(x=subject) for frame in frames for subject in question.subjects]
    all_ = [*framed, *question.others]
    held_out = 1 + zlib.crc32(question.answer.encode()) % (len(all_) - 1)
    return [all_[held_out]] if split == "held_out" else [*all_[:held_out], *all_[held_out + 1 :]]


def exchange(rng: random.Random, split: Split, thinking: bool) -> Exchange:
    """One question, in one of its wordings, maybe typed carelessly."""
    question = rng.choice(QUESTIONS)
    user = rng.choice(wordings(question, split))
    if rng.random() < CARELESS:
        user = user.rstrip("?.!").lower()
    return Exchange(user, question.thought, question.answer)


def generate(rng: random.Random, split: Split) -> Problem:
    """A problem of one question."""
    thinking = rng.random() < 0.5
    return conversation("english", [exchange(rng, split, thinking)], thinking)
