"""What the prefix cache saves where requests begin alike."""

from __future__ import annotations

import statistics
from functools import partial
from typing import NamedTuple

import numpy as np

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import exactly, random_tokens, requests
from glmjax.bench.streams import Outcome, answer, in_turn, ratios
from glmjax.engine import Engine
from glmjax.tables import Table
from glmjax.types import Request


class Sizes(NamedTuple):
    """How many requests, and their tokens."""

    rounds: int = 3
    requests: int = 32
    common: int = 1000
    own: int = 30
    new_tokens: int = 16


QUICK = Sizes(rounds=1, requests=4, common=100, own=10, new_tokens=4)


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Total time and computed tokens, without the cache and with it."""
    asked = _requests(sizes)
    cases = {
        "without": partial(_run, engines.engine(prefix_cache=False), asked),
        "with": partial(_run, engines.engine(), asked),
    }
    found = in_turn(cases, sizes.rounds, "prefix")
    seconds = {name: [outcome.seconds for outcome in found[name]] for name in found}
    rows = [
        (
            name,
            found[name][-1].done.computed_tokens,
            statistics.median(seconds[name]),
            *ratios(seconds[name], seconds["without"]),
        )
        for name in found
    ]
    columns = ("prefix cache", "computed tokens", "seconds", "ratio", "least", "most")
    return [Table("Requests with a common beginning", columns, rows, _note(sizes))]


def _note(sizes: Sizes) -> str:
    return (
        f"{sizes.requests} requests at once of {sizes.common} common and {sizes.own} own tokens, "
        f"{sizes.new_tokens} new ones each; the cache is empty at the start of each round. Medians "
        f"of {sizes.rounds} rounds."
    )


def _requests(sizes: Sizes) -> list[Request]:
    rng = np.random.default_rng(0)
    common = random_tokens(rng, sizes.common)
    prompts = [common + random_tokens(rng, sizes.own) for _ in range(sizes.requests)]
    return requests(prompts, exactly(sizes.new_tokens))


def _run(engine: Engine, asked: list[Request]) -> Outcome:
    engine.flush_cache()
    return answer(engine, asked)
