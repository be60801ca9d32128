"""What it costs to round alike in every batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import exactly, held_out, requests
from glmjax.bench.streams import RATE_COLUMNS, Outcome, answer, in_turn, rate_rows
from glmjax.engine import Engine
from glmjax.tables import Table
from glmjax.types import Request


class Sizes(NamedTuple):
    """How many new tokens each of several streams gets."""

    rounds: int = 5
    new_tokens: int = 128
    streams: tuple[int, ...] = (1, 8)


QUICK = Sizes(rounds=1, new_tokens=8, streams=(1, 2))


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Tokens a second in deterministic mode, relative to the default."""
    default, deterministic = engines.engine(), engines.engine(deterministic=True)
    rows = []
    for streams in sizes.streams:
        asked = requests(held_out(engines.served, streams), exactly(sizes.new_tokens))
        cases = {
            "default": partial(_run, default, asked),
            "deterministic": partial(_run, deterministic, asked),
        }
        found = in_turn(cases, sizes.rounds, f"deterministic, {streams} at once")
        rows += rate_rows(streams, found)
    note = (
        f"Held-out chats, greedy, {sizes.new_tokens} new tokens each, drafting on, prompts "
        f"included in the time. Medians of {sizes.rounds} rounds."
    )
    return [Table("Deterministic mode", RATE_COLUMNS, rows, note)]


def _run(engine: Engine, asked: list[Request]) -> Outcome:
    engine.flush_cache()
    return answer(engine, asked)
