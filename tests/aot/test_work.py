"""The planner's arithmetic against steps that were compiled for GPUs."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from described import CHUNK, DECODE, DRAFTS, MIXED, ROWS, VERIFY, mesh_of, official, step_of
from glmjax.config import MeshConfig
from glmjax.planner.ops import Queries
from glmjax.planner.work import step_work
from glmjax.plans import Bucket
from glmjax.runner.outputs import BLOCK
from pallas_kernels.backend import Backend

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]


class Step(NamedTuple):
    """A bucket that is full: what its step computes."""

    queries: list[Queries]
    sampled: int
    drafts: int


STEPS = {
    DECODE: Step([Queries(ROWS, 1, 1)], ROWS, 0),
    VERIFY: Step([Queries(ROWS, 1 + DRAFTS, 1)], ROWS * (1 + DRAFTS), DRAFTS),
    MIXED: Step(
        [Queries(ROWS, 1 + DRAFTS, 1), Queries(ROWS, CHUNK // ROWS, 1)],
        ROWS * (1 + DRAFTS) + ROWS,
        DRAFTS,
    ),
}
NAMES = {DECODE: "decode", VERIFY: "verify", MIXED: "mixed"}


@pytest.mark.parametrize("bucket", STEPS, ids=NAMES.get)
def test_what_crosses_devices_is_what_the_program_sends(bucket: Bucket):
    model = official("GLM-4.5-FP8", Backend("mosaic"))
    report = step_of(model, mesh_of("h100", tensor=8), bucket).report
    queries, sampled, drafts = STEPS[bucket]
    mesh = MeshConfig(1, 8)
    work = step_work(model, mesh, "bfloat16", queries, sampled=sampled, drafts=drafts)
    sent = {"all-reduce": 0, "all-gather": 0}
    for op in report.collectives:
        sent[op.kind] += op.size_bytes
    # Log probabilities of the prompt, a branch that is taken where somebody asks for them,
    # and the body of a loop over blocks.
    asked = min(BLOCK, bucket.chunk_tokens) * model.vocab_size * 4
    assert sent == {"all-reduce": work.sum_bytes, "all-gather": work.join_bytes + asked}
