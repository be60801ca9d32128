"""`serve.py --plan`: what it takes from the command line, and what it prints."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import jax

from glmjax.aot.hardware import GPUS
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.planner import plot, report
from glmjax.planner.plan import Workload, plan

PLANNING = """What does --model take of these GPUs, and how fast can it be at most? Its steps are
compiled for GPUs that need not be there, in a minute, and no weights are needed: --model may be a
release such as zai-org/GLM-4.5-FP8, or a folder. Options mean what they mean for a server on GPUs.
Exit status 1: it does not fit."""


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of planning."""
    add = p.add_argument_group("planning, with no GPU", PLANNING).add_argument
    default = Workload()
    add("--plan", action="store_true", help="print a plan instead of serving")
    add("--device", choices=GPUS, default="h100", help="GPUs to plan for; default h100")
    add(
        "--batches",
        type=_positive,
        nargs="+",
        default=default.batches,
        metavar="N",
        help="requests at once to look at; default 1 8 64 256",
    )
    add(
        "--context-tokens",
        type=_positive,
        default=default.context_tokens,
        metavar="N",
        help="behind each request that decodes; default %(default)s",
    )
    add(
        "--prompt-tokens",
        type=_positive,
        default=default.prompt_tokens,
        metavar="N",
        help="of a prompt; default %(default)s",
    )
    add(
        "--accepted-tokens",
        type=float,
        default=default.accepted_tokens,
        metavar="X",
        help="of a request in a step with drafts; default %(default)g, about what others see on "
        "text with 3 drafts",
    )
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--plot", type=Path, metavar="FILE.png", help="draw memory and bounds into a file too")


def run(
    args: argparse.Namespace, mesh: MeshConfig, cache: CacheConfig, scheduler: SchedulerConfig
) -> int:
    """Print a plan; 1 where the model does not fit.

    Raises:
        ConfigError: as `plan` and `plot.save`.
    """
    jax.config.update("jax_platforms", "cpu")  # the GPUs are described, whatever is there
    workload = Workload(
        batches=tuple(args.batches),
        context_tokens=args.context_tokens,
        prompt_tokens=args.prompt_tokens,
        accepted_tokens=args.accepted_tokens,
    )
    found = plan(
        args.model,
        mesh,
        args.device,
        dtype=args.dtype,
        cache=cache,
        scheduler=scheduler,
        kernels="mosaic" if args.kernels == "auto" else args.kernels,
        memory_fraction=args.memory_fraction,
        workload=workload,
    )
    print(report.as_json(found) if args.json else report.text(found))
    if args.plot:
        plot.save(found, args.plot)
        logging.getLogger(__name__).info("drawn: %s", args.plot)
    return 0 if found.fits else 1


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number
