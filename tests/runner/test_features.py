"""All that a request may ask for, in one crowd: each gives what a plain forward pass says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from answers import Limited, ask, tokens_of
from oracle import Neighbours
from tiny import TINY

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.types import Request, SamplingParams

NEW = 18
CIRCLE = 53  # greedy outputs of TINY often come by here


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist())


PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 1.5, "repetition_penalty": 1.6}
BIAS = {CIRCLE: -100.0, 7: 3.0, 11: 2.5}
CUTS = {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.02, "seed": 6}
ALL = PENALTIES | CUTS | {"logit_bias": BIAS, "logprobs": 20, "prompt_logprobs_start": 0}
ASKED: dict[str, dict] = {
    "greedy": {},
    "frequency": {"frequency_penalty": 2.0},
    "presence": {"presence_penalty": 2.0, "temperature": 1.0, "seed": 3},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": BIAS, "logprobs": 5},
    "min_new_tokens": {"min_new_tokens": 10, "stop_token_ids": range(0, TINY.vocab_size, 5)},
    "constraint": {"constraint": True, "logprobs": 2},
    "top_k": {"temperature": 1.5, "top_k": 5, "seed": 2**32 - 1},
    "top_p": {"temperature": 1.5, "top_p": 0.6, "seed": 3},
    "min_p": {"temperature": 1.5, "min_p": 0.3, "seed": 4},
    "cuts": CUTS,
    "sampled": {"temperature": 1.0, "seed": 9, "logprobs": 1},
    "prompt": {"logprobs": 0, "prompt_logprobs_start": 0},
    "part of the prompt": {"logprobs": 3, "prompt_logprobs_start": 13},
    "all": ALL | {"constraint": True, "min_new_tokens": 4, "stop_token_ids": range(40)},
    "all but a constraint": ALL,
}

CHANGES = [
    (name, field)
    for name, fields in ASKED.items()
    for field in fields
    if "logprobs" not in field and len(fields) < 4
]


def make(name: str, fields: dict | None = None) -> Request:
    """One of ASKED, perhaps with other fields; a prompt of its own, and a fresh constraint."""
    always = {"temperature": 0.0, "max_new_tokens": NEW, "ignore_eos": True}
    fields = always | (ASKED[name] if fields is None else fields)
    constraint = Neighbours() if fields.pop("constraint", False) else None
    place = list(ASKED).index(name)
    prompt_ids = prompt(place, 3 + (7 * place) % 38)
    return Request(name, prompt_ids, SamplingParams(**fields), constraint)


def crowd() -> list[Request]:
    return [make(name) for name in ASKED]


@pytest.fixture(scope="module")
def alone(plain, oracle):
    """Each request with a runner to itself, checked."""
    answers = {name: ask(Engine(plain), [make(name)])[name] for name in ASKED}
    for name, answer in answers.items():
        oracle.check(make(name), answer)
    return answers


@pytest.mark.parametrize(("name", "field"), CHANGES)
def test_each_field_makes_a_difference(alone, plain, name, field):
    """Else the tests below would show little."""
    fields = {key: value for key, value in ASKED[name].items() if key != field}
    assert ask(Engine(plain), [make(name, fields)])[name].tokens != alone[name].tokens


@pytest.mark.parametrize("name", ["plain", "drafting", "split"])
@pytest.mark.parametrize("pages", [200, 17], ids=["roomy", "cramped"])
def test_a_crowd_gives_what_each_gives_alone(request, alone, oracle, always_drafting, name, pages):
    """One sequence of the longest fits in 17 pages, four do not."""
    engine = Engine(Limited(request.getfixturevalue(name), pages=pages))
    requests = crowd()
    answers = ask(engine, requests)
    for asked in requests:
        oracle.check(asked, answers[asked.id])
    assert tokens_of(answers) == tokens_of(alone)
    counters = engine.counters()
    assert (counters.preemptions > 0) == (pages == 17)
    assert (sum(counters.accepted) > 0) == (name != "plain")


@pytest.mark.parametrize("name", ["plain", "drafting"])
def test_a_prefix_hit_changes_nothing(request, alone, oracle, name):
    engine = Engine(request.getfixturevalue(name))
    for round in range(2):
        requests = crowd()
        answers = ask(engine, requests)
        hits = [a.cached for a in answers.values()]
        for asked in requests:
            oracle.check(asked, answers[asked.id])
        assert tokens_of(answers) == tokens_of(alone)
        assert (sum(hits) > 0) == round


def test_a_slot_forgets_who_had_it(drafting, alone):
    """After requests that change logits, plain ones in the same slots."""
    engine = Engine(drafting)
    names = ["all", "bias", "frequency", "repetition"]
    ask(engine, [make(name) for name in names])
    plain = {f"{i}": replace(make("greedy"), id=f"{i}") for i in range(drafting.limits.slots)}
    for answer in ask(engine, plain.values()).values():
        assert answer.tokens == alone["greedy"].tokens


def test_same_seed_same_sample_other_seed_another(drafting):
    engine = Engine(drafting, SchedulerConfig(prefix_cache=False))
    base = make("sampled")
    seeds = {"a": 9, "b": 9, "c": 10}
    requests = [
        replace(base, id=id, sampling=replace(base.sampling, seed=seed))
        for id, seed in seeds.items()
    ]
    tokens = tokens_of(ask(engine, requests))
    assert tokens["a"] == tokens["b"] != tokens["c"]
