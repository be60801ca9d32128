"""Measure an engine on this machine. See `python -m glmjax.bench --help`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glmjax.bench import (
    chat,
    constrained,
    deterministic,
    drafting,
    host,
    prefix,
    scheduling,
    tokens,
)
from glmjax.bench.engines import Engines, describe, of_model
from glmjax.bench.report import load_average, machine
from glmjax.config import DTYPES
from glmjax.errors import GlmjaxError
from glmjax.tables import Table
from glmjax.train.arguments import positive


class Measure(NamedTuple):
    """Something to measure.

    Attributes:
        about: what it tells.
        run: gives its tables.
        full, quick: sizes to run it with.
    """

    about: str
    run: Callable[[Engines, Any], list[Table]]
    full: Any
    quick: Any


MEASURES = {
    name: Measure(about, room.measure, room.Sizes(), room.QUICK)
    for name, room, about in (
        ("host", host, "host work of a step, with no device"),
        ("tokens", tokens, "time to the tokens of a long chat that grows by a turn"),
        ("prefix", prefix, "time that the prefix cache saves on requests that begin alike"),
        ("chat", chat, "cached share of the prompts of a chat with tools"),
        ("drafting", drafting, "tokens a second with drafts, and how many are accepted"),
        ("scheduling", scheduling, "gaps of streams while long prompts arrive"),
        ("deterministic", deterministic, "tokens a second in deterministic mode"),
        ("constrained", constrained, "tokens a second with a grammar, and the time of masks"),
    )
}

EPILOG = f"""measures:
{chr(10).join(f"  {name:15}{measure.about}" for name, measure in MEASURES.items())}

Figures are ratios within one run, of cases that took turns; those of several runs or machines do
not compare. Let the machine be idle. All measures take about five minutes on two cores, and
longer the first time, when programs are compiled.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.bench",
        description="Measure an engine on this machine, in tables that markdown reads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="measures to run; default: all")
    p.add_argument("--model", type=Path, help="converted folder; default: the bundled glm-nano")
    p.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    p.add_argument("--rounds", type=positive, help="of each comparison; default: 3 or 5")
    p.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables as they are measured; all figures, for JSON."""
    engines = Engines(of_model(args.model, args.dtype))
    where = machine() | describe(args.model, args.dtype)
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    tables: dict[str, Any] = {}
    for name in args.names or MEASURES:
        measure = MEASURES[name]
        sizes = measure.quick if args.quick else measure.full
        found = measure.run(engines, sizes._replace(rounds=args.rounds or sizes.rounds))
        tables[name] = [table._asdict() for table in found]
        for table in found:
            print(f"\n{table.text()}", flush=True)
    print(f"\nload average at the end: {load_average()}")
    return {"machine": where, "measures": tables, "load average at the end": load_average()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when measured, 1 when it could not, 2 for a wrong command line."""
    p = parser()
    args = p.parse_args(arguments)
    if unknown := [name for name in args.names if name not in MEASURES]:
        p.error(f"unknown measure {unknown[0]}; expected some of {', '.join(MEASURES)}")
    logging.basicConfig(level=logging.WARNING)
    try:
        found = run(args)
    except GlmjaxError as error:
        print(f"glmjax.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
