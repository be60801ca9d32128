"""The official releases on 1 to 16 GPUs: docs/h100.md quotes what this prints.

python -m glmjax.planner.survey
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax

from glmjax.aot.hardware import GPUS
from glmjax.aot.program import Report
from glmjax.errors import ConfigError, GlmjaxError
from glmjax.planner.deployment import Deployment
from glmjax.planner.memory import GIB
from glmjax.planner.plan import Plan, compile_steps, plan
from glmjax.tables import Table

MODELS = ("GLM-4.5", "GLM-4.5-FP8", "GLM-4.5-Air", "GLM-4.5-Air-FP8")
MESHES = (1, 2, 4, 8, 16)
COLUMNS = (
    "GPUs",
    "weights GiB",
    "KV GiB",
    "KV tokens",
    "of 8k",
    "of 128k",
    "1: tok/s",
    "64: tok/s",
    "256: tok/s",
    "TTFT 4k ms",
    "launches",
)
NOTE = """Weights and KV of one GPU; requests of 8,192 and 131,072 tokens that the KV pool holds;
bounds of output tokens/s of 1, 64 and 256 requests with 4,096 tokens behind each, without drafts,
in brackets where fewer run at once, for lack of KV or of slots (128); bound of the time to the
first token of 4,096; launches of a decode step, compiled. A dash: it does not fit."""


class Compiled:
    """Steps by model and mesh: those for H100 and H200 are alike but for their names."""

    def __init__(self) -> None:
        self._known: dict[Deployment, dict[str, Report]] = {}

    def __call__(self, deployment: Deployment, device: str) -> dict[str, Report]:
        kernels = replace(deployment.model.kernels, device="")
        key = replace(deployment, model=replace(deployment.model, kernels=kernels))
        if key not in self._known:
            self._known[key] = compile_steps(deployment, device)
        return self._known[key]


def survey(models: Sequence[str], devices: Sequence[str], meshes: Sequence[int]) -> Iterator[Table]:
    """A table for each model and kind of GPU, a row for each mesh."""
    compiled = Compiled()
    for model in models:
        for device in devices:
            found = [(n, _planned(model, n, device, compiled)) for n in meshes]
            rows = [_row(n, one) for n, one in found]
            yield Table(f"{model} on {device.upper()}", COLUMNS, rows)


def _planned(model: str, tensor: int, device: str, compiled: Compiled) -> Plan | None:
    try:
        return plan(model, tensor, device, compiled=compiled)
    except ConfigError as error:
        logging.getLogger(__name__).warning("%s on %d: %s", model, tensor, error)
        return None


def _row(tensor: int, found: Plan | None) -> tuple[object, ...]:
    if found is None or not found.fits:
        weights = found and found.memory.weights_bytes / GIB
        return (tensor, weights, *["-"] * (len(COLUMNS) - 2))
    rates = {row.batch: row.tokens_per_s for row in found.decode}
    fit = found.running(found.workload.context_tokens + 1)
    return (
        tensor,
        found.memory.weights_bytes / GIB,
        found.memory.pool_bytes / GIB,
        found.kv_tokens,
        found.requests(8192),
        found.requests(131072),
        *(f"{rates[n]:,.0f}" if n <= fit else f"({rates[n]:,.0f})" for n in (1, 64, 256)),
        found.prefill[0].first_s * 1e3,
        len(found.steps[0].report.launches),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2: JAX cannot compile for GPUs here."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.planner.survey",
        description="Plan the official releases on 1 to 16 GPUs, with none there (ten minutes), and"
        " print the tables of docs/h100.md.",
    )
    p.add_argument("--models", nargs="+", default=MODELS, help="default: %(default)s")
    p.add_argument("--devices", nargs="+", choices=GPUS, default=tuple(GPUS))
    p.add_argument("--meshes", nargs="+", type=int, default=MESHES, help="default: %(default)s")
    args = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        print(NOTE)
        for table in survey(args.models, args.devices, args.meshes):
            print(f"\n{table.text()}", flush=True)
    except GlmjaxError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
