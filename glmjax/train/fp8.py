"""What FP8 costs in accuracy: `python -m glmjax.train.fp8 --help`.

One HF checkpoint is run in several forms: in BF16, and with its weights, its KV or both in FP8.
Each form answers the same held-out problems, and reads the same held-out conversations.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from convert.hf_to_orbax import convert
from glmjax.bundled import ASSET
from glmjax.config import CacheConfig, SchedulerConfig
from glmjax.devices import prepare
from glmjax.errors import GlmjaxError
from glmjax.llm import LLM, Completion
from glmjax.tables import Table
from glmjax.text.chat import ChatTemplate
from glmjax.train.arguments import positive
from glmjax.train.data.encode import encode
from glmjax.train.data.mixture import draw
from glmjax.train.evaluate import MAX_NEW_TOKENS, MEASURES, measure
from glmjax.types import MAX_LOGPROBS, TokenLogprobs

AT_ONCE, MAX_SEQ_LEN = 16, 1024
CACHE_BYTES = 64 << 20
SCHEDULER = SchedulerConfig(AT_ONCE, max_seq_len=MAX_SEQ_LEN)


class Form(NamedTuple):
    """How a checkpoint is run.

    Attributes:
        quantize: of the conversion.
        kv_dtype: of the pool.
        dtype: of all that is not FP8; None: the checkpoint's.
    """

    quantize: str | None = None
    kv_dtype: str = "auto"
    dtype: str | None = None


REFERENCE = "BF16"
FORMS = {
    REFERENCE: Form(),
    "float32": Form(dtype="float32"),
    "FP8 weights": Form("fp8"),
    "FP8 KV": Form(kv_dtype="fp8_e4m3"),
    "FP8 weights and KV": Form("fp8", "fp8_e4m3"),
}


class Found(NamedTuple):
    """What one form did.

    Attributes:
        tasks: rows of `glmjax.train.evaluate.measure`.
        drafted, accepted: drafts while it answered.
        places: at each place that the conversations' model wrote, log probabilities.
    """

    tasks: list[dict[str, Any]]
    drafted: int
    accepted: int
    places: list[TokenLogprobs]


class Distance(NamedTuple):
    """How far a form's distributions are from the reference's, over all places.

    Attributes:
        kl: mean Kullback-Leibler divergence, nats; see `divergence`.
        worst_kl: at the worst place.
        logprob: mean difference of the log probability of the token that stands there.
        changed: places where another token is the likeliest.
    """

    kl: float
    worst_kl: float
    logprob: float
    changed: int


def divergence(p: TokenLogprobs, q: TokenLogprobs) -> float:
    """KL(p || q) in nats over the tokens likely in both, all others counted as one.

    Merging outcomes lowers a divergence, here by little: few tokens have nearly all of the mass.
    """
    q_logs = dict(q.top)
    both = np.array([(log, q_logs[token]) for token, log in p.top if token in q_logs], float)
    both = both.reshape(-1, 2)
    rest = np.log(np.maximum(1 - np.exp(both).sum(0), 1e-9))
    p_logs, q_logs = np.concatenate([both, rest[None]]).T
    return float(np.sum(np.exp(p_logs) * (p_logs - q_logs)))


def distance(reference: Sequence[TokenLogprobs], form: Sequence[TokenLogprobs]) -> Distance:
    """Compare a form's places with the reference's."""
    pairs = list(zip(reference, form, strict=True))
    kl = [divergence(p, q) for p, q in pairs]
    logprob = [abs(p.logprob - q.logprob) for p, q in pairs]
    changed = sum(p.top[0][0] != q.top[0][0] for p, q in pairs)
    return Distance(float(np.mean(kl)), max(kl), float(np.mean(logprob)), changed)


def run_form(folder: Path, form: Form, problems: int, chats: int, seed: int) -> Found:
    """Let one form of the model in `folder` answer, then read."""
    cache = CacheConfig(memory_bytes=CACHE_BYTES, dtype=form.kv_dtype)
    with LLM(folder, dtype=form.dtype, cache=cache, scheduler=SCHEDULER) as llm:
        answered: list[Completion] = []

        def answer(prompts: Sequence[str]) -> list[str]:
            answered.extend(_generate(llm, prompts, max_new_tokens=MAX_NEW_TOKENS))
            return [completion.text for completion in answered[-len(prompts) :]]

        tasks = measure(answer, problems, seed, MEASURES)
        drafted, accepted = (sum(counts) for counts in zip(*map(_drafts, answered), strict=True))
        return Found(tasks, drafted, accepted, list(_read(llm, folder, chats, seed)))


def _drafts(completion: Completion) -> tuple[int, int]:
    return completion.drafted_tokens, completion.accepted_tokens


def _generate(llm: LLM, prompts: Sequence[Any], **sampling: Any) -> list[Completion]:
    answers = llm.generate(list(prompts), temperature=0.0, **sampling)
    assert isinstance(answers, list)
    return answers


def _read(llm: LLM, folder: Path, chats: int, seed: int) -> Iterator[TokenLogprobs]:
    """Log probabilities where held-out conversations have a token of the model's."""
    rng, template = random.Random(seed), ChatTemplate.from_folder(folder)
    assert template is not None
    drawn = [draw(rng, "held_out") for _ in range(chats)]
    texts = [encode(problem, template, llm.served.tokenizer) for problem in drawn]
    texts = [text for text in texts if len(text[0]) < MAX_SEQ_LEN]
    read = {"max_new_tokens": 1, "logprobs": MAX_LOGPROBS, "prompt_logprobs_start": 0}
    answers = _generate(llm, [ids for ids, _ in texts], **read)
    for (_, own), answer in zip(texts, answers, strict=True):
        pairs = zip(own, answer.prompt_logprobs, strict=True)
        yield from (place for is_own, place in pairs if is_own and place is not None)


def run_all(source: Path, problems: int, chats: int, seed: int) -> dict[str, Found]:
    """Every form of the HF checkpoint `source`, by name."""
    with TemporaryDirectory() as made:
        folders = {form.quantize: Path(made) / f"{form.quantize}" for form in FORMS.values()}
        for quantize, folder in folders.items():
            convert(source, folder, quantize=quantize)
        return {
            name: run_form(folders[form.quantize], form, problems, chats, seed)
            for name, form in FORMS.items()
        }


def tables(found: dict[str, Found]) -> list[Table]:
    """All forms beside each other: distances, and tasks."""
    reference = found[REFERENCE]
    columns = "form", "right", "other token", "KL", "worst KL", "log prob.", "drafts accepted"
    rows = []
    for name, form in found.items():
        to = distance(reference.places, form.places)
        right = sum(row["right"] for row in form.tasks)
        accepted = form.accepted / form.drafted if form.drafted else None
        rows.append((name, right, to.changed, to.kl, to.worst_kl, to.logprob, accepted))
    asked = sum(row["problems"] for row in reference.tasks)
    note = (
        f"Right of {asked} held-out problems; the rest against {REFERENCE} at "
        f"{len(reference.places)} places of held-out conversations: where another token is the "
        "likeliest, mean and worst divergence in nats, mean change of the log probability of the "
        "right token. Then the share of verified drafts that were accepted."
    )
    by_task = zip(*(form.tasks for form in found.values()), strict=True)
    task_rows = [(row[0]["task"], *(form["right"] for form in row)) for row in by_task]
    return [
        Table("Forms", columns, rows, note),
        Table("Right, by task", ("task", *found), task_rows),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.train.fp8",
        description="Measure what FP8 weights and FP8 KV change in what a model answers.",
    )
    p.add_argument(
        "--source",
        type=Path,
        default=ASSET,
        help="BF16 checkpoint in HF's format, trained on what glm-nano was; default: glm-nano",
    )
    p.add_argument("--count", type=positive, default=50, help="problems a task; default 50")
    p.add_argument("--chats", type=positive, default=200, help="conversations read; default 200")
    p.add_argument("--seed", type=int, default=0, help="of problems and conversations; default 0")
    p.add_argument("--json", type=Path, help="also write the tables' figures here")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when measured, 1 when the checkpoint could not be converted or loaded."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        prepare(1)
        made = tables(run_all(args.source, args.count, args.chats, args.seed))
    except GlmjaxError as error:
        print(f"glmjax.train.fp8: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps([t._asdict() for t in made], indent=1) + "\n", "utf-8")
    print("\n\n".join(table.text() for table in made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
