"""Held-out problems through a served model's HTTP API: `python -m glmjax.train.evaluate --help`."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.chat import ChatTemplate
from glmjax.train.arguments import positive
from glmjax.train.data import tools
from glmjax.train.data.encode import render_prompt
from glmjax.train.data.mixture import draw
from glmjax.train.data.problem import Problem
from glmjax.train.data.tool_text import score

MAX_NEW_TOKENS = 256
AT_ONCE = 32
TIMEOUT_S = 600.0

Answer = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Measure:
    """One row of the report.

    Attributes:
        task: of the mixture.
        thinking: forces thinking on or off; None: as drawn.
        keep: which of the drawn problems count.
    """

    task: str
    thinking: bool | None = None
    keep: Callable[[Problem], bool] = lambda problem: True


def calls_unseen(problem: Problem) -> bool:
    """Whether all tools that must be called have made-up names that training never showed."""
    turns = [call for m in problem.messages for call in m.get("tool_calls", [])]
    return all(tools.is_made_up(call["function"]["name"]) for call in turns)


MEASURES = {
    **{f"{name}, thinking": Measure(name, True) for name in ("add", "subtract", "multiply")},
    **{f"{name}, not thinking": Measure(name, False) for name in ("add", "subtract", "multiply")},
    "one call": Measure("tool_call"),
    "one call, name never seen": Measure("tool_call", None, calls_unseen),
    "two calls": Measure("tool_two"),
    "answer from a result": Measure("tool_answer"),
    "tools not needed": Measure("tool_none"),
    "facts from the system prompt": Measure("facts"),
    **{name: Measure(name) for name in ("copy", "extract", "count", "reverse", "upper")},
    "several turns": Measure("multi_turn"),
    "questions about glmjax": Measure("english"),
}


def problems(measure: Measure, count: int, seed: int) -> list[Problem]:
    """`count` different held-out problems of a measure; fewer where there are no more."""
    rng = random.Random(f"{seed} {measure.task}")
    found: dict[str, Problem] = {}
    for _ in range(50 * count):
        problem = draw(rng, "held_out", measure.task)
        if measure.keep(problem):
            found.setdefault(json.dumps([problem.messages, problem.tools]), problem)
        if len(found) == count:
            break
    thinking = measure.thinking
    return [p if thinking is None else replace(p, thinking=thinking) for p in found.values()]


def ask(url: str, prompts: Sequence[str]) -> list[str]:
    """The served model's greedy continuations.

    Raises:
        httpx.HTTPError: the server cannot be reached or refuses.
    """
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    body = {"text": list(prompts), "sampling_params": sampling}
    reply = httpx.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
    reply.raise_for_status()
    return [answer["text"] for answer in reply.json()]


def evaluate(url: str, count: int, seed: int, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """`measure` of the model that is served at `url`. Raises as `ask` does."""
    return measure(partial(ask, url), count, seed, tasks)


def measure(answer: Answer, count: int, seed: int, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each of `tasks`, names of MEASURES: problems, right, and some wrong answers.

    `answer` continues prompts greedily, by up to MAX_NEW_TOKENS.
    """
    template = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
    rows = []
    for name in tqdm(tasks, "measuring", unit="task", disable=None):
        asked = problems(MEASURES[name], count, seed)
        prompts = [render_prompt(problem, template) for problem in asked]
        texts = [
            text
            for start in range(0, len(prompts), AT_ONCE)
            for text in answer(prompts[start : start + AT_ONCE])
        ]
        right = [score(problem, text) for problem, text in zip(asked, texts, strict=True)]
        wrong = [(p, t) for p, t, good in zip(prompts, texts, right, strict=True) if not good]
        rows.append({"task": name, "problems": len(asked), "right": sum(right), "wrong": wrong[:5]})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report as a Markdown table."""
    lines = ["| task | right | problems | share |", "|---|---|---|---|"]
    for row in rows:
        share = 100 * row["right"] / row["problems"]
        lines.append(f"| {row['task']} | {row['right']} | {row['problems']} | {share:.1f} % |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.train.evaluate",
        description="Measure a served glm-nano on problems that training never showed.",
        epilog="Start a server first: python serve.py",
    )
    p.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    p.add_argument("--count", type=positive, default=200, help="problems a task; default 200")
    p.add_argument(
        "--task", action="append", choices=MEASURES, help="may be repeated; default: all"
    )
    p.add_argument("--seed", type=int, default=0, help="of the problems; default 0")
    p.add_argument("--json", type=Path, help="also write the rows, with wrong answers, here")
    return p


def main() -> int:
    """Exit status: 0 when measured, 1 when the server could not be asked."""
    args = parser().parse_args()
    try:
        rows = evaluate(args.url, args.count, args.seed, args.task or MEASURES)
    except httpx.HTTPError as error:
        print(f"glmjax.train.evaluate: {args.url}: {error}; is it serving?", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
