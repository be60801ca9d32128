"""A plan in words, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from glmjax.config import MeshConfig
from glmjax.planner.fitting import options
from glmjax.planner.memory import GIB
from glmjax.planner.plan import Plan, Step
from glmjax.planner.roofline import Bound
from glmjax.tables import Table

CAVEAT = (
    "Bounds, not promises: every kernel perfect, nothing between two of them. Launches, the "
    "latency of collectives, sampling and padding come on top. Experts are chosen evenly at random."
)


def text(plan: Plan) -> str:
    """All that a person needs to decide, for a terminal and as markdown."""
    parts = [headline(plan), "", *(f"{table.text()}\n" for table in tables(plan))]
    return "\n".join(parts).rstrip()


def headline(plan: Plan) -> str:
    """Whether it fits, and what to type."""
    mesh = plan.deployment.mesh
    where = f"{mesh.size} x {plan.gpu.name} ({options(mesh)})"
    if plan.limits is None:
        missing = -plan.memory.left_bytes / GIB
        return f"{plan.name} does not fit {where}: {missing:.1f} GiB a device are missing.\n" + (
            f"What to do: {plan.advice}."
        )
    lines = [
        f"{plan.name} fits {where}: {plan.kv_tokens:,} tokens of KV, requests of up to "
        f"{plan.limits.max_seq_len:,}.",
        f"Smallest mesh that holds it: {options(plan.smallest)}." if plan.smallest else "",
        f"Serve it:  python serve.py --model FOLDER {typed(mesh)}",
        "and what else this plan was asked for with.",
    ]
    return "\n".join(filter(None, lines))


def typed(mesh: MeshConfig) -> str:
    """`mesh` as each of its hosts is told it."""
    own = " --host-index I --coordinator HOST:PORT" if mesh.hosts > 1 else ""
    return options(mesh) + own


def tables(plan: Plan) -> Iterator[Table]:
    """The figures; of a deployment that does not fit, only its memory."""
    yield memory_table(plan)
    if plan.fits:
        yield requests_table(plan)
        yield steps_table(plan)
        yield decode_table(plan)
        yield prefill_table(plan)
        if plan.deployment.drafting:
            yield drafting_table(plan)


def memory_table(plan: Plan) -> Table:
    """Where a device's memory goes."""
    memory = plan.memory
    parts = {
        "weights": memory.weights_bytes,
        "KV pool": memory.pool_bytes,
        "temporaries of the largest step": memory.temp_bytes,
        "tables of the slots": memory.tables_bytes,
        "reserve": memory.reserve_bytes,
        "left" if memory.left_bytes >= 0 else "missing": abs(memory.left_bytes),
        "XLA's in all": memory.usable_bytes,
        "the device's": plan.gpu.memory_bytes,
    }
    rows = [(name, size / GIB, size / plan.gpu.memory_bytes) for name, size in parts.items()]
    return Table("Memory of a device", ("", "GiB", "share"), rows)


def requests_table(plan: Plan) -> Table:
    """How many requests of which length the KV pool holds."""
    limits = plan.limits
    assert limits is not None
    slots = limits.groups * limits.slots
    rows = [(n, plan.requests(n), plan.running(n)) for n in plan.workload.lengths]
    columns = ("tokens a request", "fit in the KV pool", "run at once")
    note = f"Prompt and output together; at most {slots} run at once (--max-running-requests)."
    return Table("Requests", columns, rows, note)


def steps_table(plan: Plan) -> Table:
    """What the largest steps do, compiled."""
    columns = (
        "step",
        "sequences",
        "tokens",
        "launches",
        "arguments",
        "collectives",
        "GB moved",
        "GFLOP",
        "MB sent",
        "bound ms",
        "bound by",
    )
    rows = [_step_row(step) for step in plan.steps]
    note = (
        "The largest step of each kind, of one device: launches, arguments and collectives as "
        "compiled; bytes and products as the model needs them, with "
        f"{plan.workload.context_tokens:,} tokens behind each sequence."
    )
    return Table("Steps", columns, rows, note)


def _step_row(step: Step) -> tuple[Any, ...]:
    report, work = step.report, step.work
    moved = sum(op.moved_bytes for op in work.ops)
    return (
        step.name,
        step.sequences,
        step.tokens,
        len(report.launches),
        report.argument_count,
        len(report.collectives),
        moved / 1e9,
        sum(op.flops for op in work.ops) / 1e9,
        step.wire_bytes / 1e6,
        step.bound.seconds * 1e3,
        limits_of(step.bound),
    )


def decode_table(plan: Plan) -> Table:
    """What bounds decoding."""
    context = plan.workload.context_tokens
    fit = plan.running(context + 1)
    rows = [
        (
            row.batch,
            row.step_s * 1e3,
            row.tokens_per_s,
            row.tokens_per_s_user,
            limits_of(row.bound),
            longest(row.bound),
            "yes" if row.batch <= fit else "no",
        )
        for row in plan.decode
    ]
    columns = ("requests", "step ms", "tokens/s", "each", "bound by", "longest", "can run")
    title = f"Decoding with {context:,} tokens behind each request, without drafts"
    return Table(title, columns, rows, CAVEAT)


def prefill_table(plan: Plan) -> Table:
    """What bounds the time to the first token."""
    workload, chunk = plan.workload, plan.deployment.scheduler.chunked_prefill_size
    rows = [
        (row.batch, row.first_s * 1e3, row.last_s * 1e3, row.tokens_per_s, limits_of(row.bound))
        for row in plan.prefill
    ]
    columns = ("prompts at once", "first TTFT ms", "last TTFT ms", "prompt tokens/s", "bound by")
    title = f"Prompts of {workload.prompt_tokens:,} tokens, {chunk:,} a step"
    return Table(title, columns, rows, "Bounds as above; nothing cached, nothing else running.")


def drafting_table(plan: Plan) -> Table:
    """What drafting can gain."""
    drafts, workload = plan.deployment.scheduler.speculative_num_steps, plan.workload
    rows = [
        (row.batch, row.decode_s * 1e3, row.verify_s * 1e3, row.ratio, row.break_even)
        for row in plan.drafting
    ]
    columns = ("requests", "plain step ms", "with drafts ms", "tokens/s ratio", "break even")
    title = f"Drafting {drafts} tokens, {workload.accepted_tokens:g} accepted a step"
    note = "Bounds as above. Above the break even of accepted tokens a step, drafting gains."
    return Table(title, columns, rows, note)


def limits_of(bound: Bound) -> str:
    """What bounds a step, the most of it first: "memory 0.83, links 0.17"."""
    shares = sorted(bound.shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.2f}" for name, share in shares if share >= 0.01)


def longest(bound: Bound) -> str:
    """The two kinds of operation that take longest."""
    return ", ".join(
        f"{name} {cost.seconds / bound.seconds:.2f}" for name, cost in list(bound.by.items())[:2]
    )


def as_json(plan: Plan) -> str:
    """Everything, as one JSON object; sizes in bytes, times in seconds."""
    return json.dumps(figures(plan), indent=1)


def figures(plan: Plan) -> dict[str, Any]:
    """A plan as what JSON can hold."""
    deployment = plan.deployment
    return {
        "model": plan.name,
        "device": plan.device,
        "mesh": asdict(deployment.mesh),
        "serve_options": options(deployment.mesh),
        "scheduler": asdict(deployment.scheduler),
        "kv_dtype": deployment.kv_dtype,
        "fits": plan.fits,
        "advice": plan.advice,
        "smallest_mesh": plan.smallest and options(plan.smallest),
        "memory": asdict(plan.memory) | {"left_bytes": plan.memory.left_bytes},
        "limits": _limits(plan),
        "kv_tokens": plan.kv_tokens,
        "requests": {n: plan.requests(n) for n in plan.workload.lengths},
        "workload": asdict(plan.workload),
        "steps": [_step_figures(step) for step in plan.steps],
        "decode": [asdict(row) for row in plan.decode],
        "prefill": [asdict(row) for row in plan.prefill],
        "drafting": [asdict(row) for row in plan.drafting],
    }


def _limits(plan: Plan) -> dict[str, Any] | None:
    if plan.limits is None:
        return None
    kept = asdict(plan.limits)
    return {name: value for name, value in kept.items() if name != "buckets"}


def _step_figures(step: Step) -> dict[str, Any]:
    report = step.report
    return {
        "name": step.name,
        "sequences": step.sequences,
        "tokens": step.tokens,
        "launches": len(report.launches),
        "arguments": report.argument_count,
        "collectives": dict(report.counts()),
        "temp_bytes": report.temp_bytes,
        "moved_bytes": sum(op.moved_bytes for op in step.work.ops),
        "flops": sum(op.flops for op in step.work.ops),
        "wire_bytes": step.wire_bytes,
        "bound": asdict(step.bound),
    }
