"""What drafting gains on held-out chats."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import GREEDY, held_out, requests
from glmjax.bench.streams import RATE_COLUMNS, Outcome, answer, in_turn, rate_rows
from glmjax.engine import Engine
from glmjax.tables import Table
from glmjax.types import Request, SamplingParams


class Sizes(NamedTuple):
    """How many chats, how long their answers may be, how many are alive at once."""

    rounds: int = 5
    chats: int = 64
    new_tokens: int = 128
    streams: tuple[int, ...] = (1, 8, 32)


QUICK = Sizes(rounds=1, chats=4, new_tokens=8, streams=(1, 2))


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Tokens a second without and with drafts, and how many of these were accepted."""
    plain, drafting = engines.engine(speculative_num_steps=0), engines.engine()
    prompts = held_out(engines.served, sizes.chats)
    asked = requests(prompts, SamplingParams(sizes.new_tokens, temperature=GREEDY.temperature))
    rows, outcomes = [], []
    for streams in sizes.streams:
        cases = {
            "one token a step": partial(_run, plain, asked, streams),
            "drafting": partial(_run, drafting, asked, streams),
        }
        found = in_turn(cases, sizes.rounds, f"drafting, {streams} at once")
        rows += rate_rows(streams, found)
        outcomes += found["drafting"]
    note = (
        f"{sizes.chats} held-out chats, greedy, up to {sizes.new_tokens} new tokens each; prompts "
        f"are part of the time. Medians of {sizes.rounds} rounds."
    )
    return [Table("Drafting", RATE_COLUMNS, rows, note), accepted(outcomes)]


def accepted(outcomes: list[Outcome]) -> Table:
    """Drafts verified and accepted at each place of the chain."""
    places = len(outcomes[0].done.drafted)
    rows: list[tuple[Any, ...]] = []
    for place in range(places):
        drafted = sum(outcome.done.drafted[place] for outcome in outcomes)
        taken = sum(outcome.done.accepted[place] for outcome in outcomes)
        rows.append((str(place + 1), drafted, taken, taken / drafted if drafted else None))
    note = "A draft counts as accepted only if those before it were."
    return Table("Drafts by place", ("place", "verified", "accepted", "share"), rows, note)


def _run(engine: Engine, asked: list[Request], streams: int) -> Outcome:
    engine.flush_cache()
    return answer(engine, asked, streams)
