"""What it costs to hold answers to a grammar."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import exactly, held_out, requests
from glmjax.bench.streams import RATE_COLUMNS, Outcome, answer, in_turn, rate_rows
from glmjax.engine import Engine
from glmjax.tables import Table
from glmjax.text.grammar import GrammarSpec
from glmjax.types import Constraint, Request

ENTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "unit": {"enum": ["kg", "m", "s"]},
    },
    "required": ["name", "count", "unit"],
    "additionalProperties": False,
}
# Longer than any answer here, so that none ends early.
SCHEMA = {"type": "array", "items": ENTRY, "minItems": 1000}
GRAMMARS = {
    "free": None,
    "any text": GrammarSpec("regex", "(?s:.*)"),
    "JSON schema": GrammarSpec("json_schema", SCHEMA),
}


class Sizes(NamedTuple):
    """How many new tokens each of several streams gets."""

    rounds: int = 5
    new_tokens: int = 128
    streams: tuple[int, ...] = (1, 8)


QUICK = Sizes(rounds=1, new_tokens=8, streams=(1, 2))


@dataclass
class Timed:
    """A constraint that notes how long its masks take.

    Attributes:
        inner: the constraint.
        seconds: of each call.
    """

    inner: Constraint
    seconds: list[float] = field(default_factory=list)

    @property
    def ends(self) -> bool:
        """As `Constraint.ends`."""
        return self.inner.ends

    @property
    def over(self) -> bool:
        """As `Constraint.over`."""
        return self.inner.over

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """As `Constraint.masks`."""
        start = time.perf_counter()
        found = self.inner.masks(drafts)
        self.seconds.append(time.perf_counter() - start)
        return found

    def advance(self, tokens: Iterable[int]) -> None:
        """As `Constraint.advance`."""
        self.inner.advance(tokens)


class Constrained(NamedTuple):
    """A run, and how long each of its masks took."""

    outcome: Outcome
    mask_s: list[float]


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Tokens a second with a grammar, relative to none; and the time that masks take."""
    rates, masks = [], []
    for streams in sizes.streams:
        sampling = replace(exactly(sizes.new_tokens), min_new_tokens=sizes.new_tokens)
        asked = requests(held_out(engines.served, streams), sampling)
        cases = {name: partial(_run, engines, asked, spec) for name, spec in GRAMMARS.items()}
        found = in_turn(cases, sizes.rounds, f"constrained, {streams} at once")
        rates += rate_rows(streams, {n: [run.outcome for run in runs] for n, runs in found.items()})
        masks += [_mask_row(n, streams, runs) for n, runs in found.items() if GRAMMARS[n]]
    note = (
        f"Held-out chats, greedy, {sizes.new_tokens} new tokens each and no end token before, "
        "drafting on. A grammar of any text shows the cost of masks alone; a schema changes the "
        "text too, and so which drafts are accepted. Medians of "
        f"{sizes.rounds} rounds."
    )
    columns = ("grammar", "streams", "masks", "median us", "p99 us", "share of the time")
    return [
        Table("Constrained decoding", RATE_COLUMNS, rates, note),
        Table("Masks", columns, masks, "A call gives the masks of a token and of its drafts."),
    ]


def _run(engines: Engines, asked: list[Request], spec: GrammarSpec | None) -> Constrained:
    engine: Engine = engines.engine()
    engine.flush_cache()
    if spec is None:
        return Constrained(answer(engine, asked), [])
    found = {r.id: engines.served.constraint(spec, r.prompt_ids, False) for r in asked}
    timed = {name: Timed(constraint) for name, constraint in found.items() if constraint}
    outcome = answer(engine, [replace(r, constraint=timed[r.id]) for r in asked])
    return Constrained(outcome, [s for one in timed.values() for s in one.seconds])


def _mask_row(name: str, streams: int, runs: Sequence[Constrained]) -> tuple[Any, ...]:
    each = [s for run in runs for s in run.mask_s]
    share = statistics.median(sum(run.mask_s) / run.outcome.seconds for run in runs)
    micro = 1e6 * np.percentile(each, (50, 99))
    return (name, streams, len(each), float(micro[0]), float(micro[1]), share)
