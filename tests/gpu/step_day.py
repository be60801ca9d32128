"""Whole steps: how long they take, to launch, with CUDA graphs and without, and to compile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from day import Day, Row
from jax.experimental.compilation_cache import compilation_cache
from models_day import Model, models, restore

from glmjax.model.spec import path_name
from glmjax.plans import Bucket, ChunkRow, DecodeRow, GroupRows, Limits, StepPlan
from glmjax.runner.blob import mask_shape, pack
from glmjax.runner.compiled import lower_step, options_for
from glmjax.runner.runner import pool_dtype
from glmjax.runner.state import make_state, state_specs
from glmjax.sharding import named_sharding
from glmjax.types import SamplingParams
from pallas_kernels.measure import seconds

PAGE_SIZE, DRAFTS = 64, 3
MOST_CALLS = 30  # a round: sequences grow while they are timed
ROOM = 1024  # positions for that

# Commands that XLA may put into CUDA graphs. A list names all that may; INVALID names none.
KERNELS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
GRAPHS: dict[str, Mapping[str, str | bool | int]] = {
    "default": {},
    "off": {"xla_gpu_enable_command_buffer": "INVALID"},
    "kernels": {"xla_gpu_enable_command_buffer": KERNELS, "xla_gpu_graph_min_graph_size": 1},
    "collectives": {
        "xla_gpu_enable_command_buffer": f"{KERNELS},COLLECTIVES",
        "xla_gpu_graph_min_graph_size": 1,
    },
}


@dataclass(frozen=True)
class Shape:
    """A step of `bucket` with all rows in use, of sequences of `length` positions."""

    name: str
    bucket: Bucket
    length: int


def shapes(day: Day) -> list[Shape]:
    """Decode, verify and prefill steps."""
    rows, length, chunk = (2, 40, 8) if day.rehearse else (64, 8192, 2048)
    return [
        *([] if day.rehearse else [Shape("decode", Bucket(1, 0, 0, 0), length)]),
        Shape("decode", Bucket(rows, 0, 0, 0), length),
        Shape("verify", Bucket(rows, DRAFTS, 0, 0), length),
        Shape("prefill", Bucket(0, DRAFTS, 1, chunk), chunk),
    ]


class Step:
    """One compiled step over sequences that are in the cache already.

    Args:
        model, shape: what runs.
        options: XLA's, for this program alone.
    """

    def __init__(self, model: Model, shape: Shape, options: Mapping[str, Any] | None = None):
        self.model, self.shape, self.limits = model, shape, limits_of(model, shape)
        mesh = model.mesh
        specs = state_specs(model.config, self.limits, pool_dtype(model.config.dtype, mesh))
        self._state = _filled(make_state(specs, mesh), self.limits, shape)
        bucket, params = shape.bucket, model.params
        lowered = lower_step(model.config, self.limits, bucket, mesh, params, self._state)
        began = time.perf_counter()
        self.program = lowered.compile(compiler_options={**options_for(mesh), **(options or {})})
        self.compile_s = time.perf_counter() - began
        blob, ones = pack(_plan(shape, self.limits), self.limits), mask_shape(bucket, self.limits)
        self._blob = jax.device_put(blob, named_sharding(mesh, ("groups", None)))
        masks = np.full(ones, 2**32 - 1, np.uint32)
        self._masks = jax.device_put(masks, named_sharding(mesh, ("groups", None, None)))

    def __call__(self) -> Any:
        """Launch it; its outputs."""
        inputs = self.model.params, self._state, self._blob, self._masks
        self._state, out = self.program(*inputs)
        return out


def limits_of(model: Model, shape: Shape) -> Limits:
    """Room for the sequences of a step and for what they grow by."""
    slots = max(shape.bucket.rows, shape.bucket.chunk_rows)
    longest = shape.length + ROOM
    pages = slots * -(-longest // PAGE_SIZE) + 1
    sizes = 1, slots, pages, PAGE_SIZE, longest, DRAFTS, model.config.vocab_size
    return Limits(*sizes, buckets=(shape.bucket,))


def _filled(state: Any, limits: Limits, shape: Shape) -> Any:
    """Every slot with a sequence and all its pages; in the order in which they lie."""
    width, held = state.page_table.shape[1], limits.pages_per_seq
    table = np.zeros((limits.slots, width), np.int32)
    table[:, :held] = 1 + np.arange(limits.slots * held).reshape(limits.slots, held)
    lens = np.full(limits.slots, shape.length, np.int32)
    last = np.arange(limits.slots, dtype=np.int32) % limits.vocab_size
    new = {"page_table": table, "seq_lens": lens, "last_token": last}
    return replace(
        state, **{n: jax.device_put(x, getattr(state, n).sharding) for n, x in new.items()}
    )


def _plan(shape: Shape, limits: Limits) -> StepPlan:
    bucket, held = shape.bucket, limits.pages_per_seq
    decode = tuple(DecodeRow(slot, bucket.drafts, held, ()) for slot in range(bucket.rows))
    chunks = ()
    if bucket.chunk_rows:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, limits.vocab_size, bucket.chunk_tokens, np.int32)
        chunks = (ChunkRow(0, 0, ids, -1, True, held, (), SamplingParams()),)
    return StepPlan(bucket, (GroupRows(decode, chunks),))


def steps(day: Day) -> Iterator[Row]:
    """A step's time beside what its bytes alone would take."""
    for step in _steps(day):
        taken = _time(step, day)
        read = step_bytes(step.model, step.shape)
        least = read / step.model.mesh.size / day.peak.bytes_s
        memory = step.program.memory_analysis()
        yield _named(step) | {
            "read_bytes": read,
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            "taken_us": 1e6 * taken,
            "roofline_us": 1e6 * least,
            "roofline_share": least / taken,
        }


def graphs(day: Day, setting: str) -> Iterator[Row]:
    """A step's time with some of its commands in CUDA graphs."""
    only = ("decode",) if day.rehearse else ("decode", "verify")
    for step in _steps(day, GRAPHS[setting], only):
        host, taken = _launch(step), _time(step, day)
        row = {"graphs": setting, "launch_us": 1e6 * host, "taken_us": 1e6 * taken}
        yield _named(step) | row


def dispatch(day: Day) -> Iterator[Row]:
    """How long the host takes to launch a program, by its arguments; and a step."""
    for count in (1, 4) if day.rehearse else (1, 10, 100, 1000):
        inputs = [jnp.zeros(8) for _ in range(count)]
        program = jax.jit(lambda *xs: xs[0] + 1).lower(*inputs).compile()
        taken = _launch(lambda run=program, xs=inputs: run(*xs))
        yield {"program": "one addition", "arguments": count, "launch_us": 1e6 * taken}
    for step in _steps(day, only=("decode",)):
        count = len(jax.tree.leaves(step.model.params))
        yield _named(step) | {"arguments": count, "launch_us": 1e6 * _launch(step)}


def compiling(day: Day) -> Iterator[Row]:
    """A decode step compiled with an empty cache of programs, and again with what that left."""
    model = restore(models(day)[-1], day.mesh())
    shape, hits = shapes(day)[0], []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    )
    with TemporaryDirectory() as folder:
        _use_cache(folder)
        for kind in ("cold", "warm"):
            jax.clear_caches()
            began, before = time.perf_counter(), len(hits)
            step = Step(model, shape)
            times = {"compile_s": step.compile_s, "whole_s": time.perf_counter() - began}
            yield _named(step) | {"cache": kind, "cache_hits": len(hits) - before} | times


def _use_cache(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def _steps(
    day: Day, options: Mapping[str, Any] | None = None, only: tuple[str, ...] = ()
) -> Iterator[Step]:
    """A model and a step at a time: two large ones would not fit."""
    for name in models(day):
        model = restore(name, day.mesh())
        for shape in shapes(day):
            if not only or shape.name in only:
                yield Step(model, shape, options)


def _named(step: Step) -> Row:
    shape = step.shape
    tokens = shape.bucket.rows * (shape.bucket.drafts + 1) + shape.bucket.chunk_tokens
    named = {"model": step.model.name, "devices": step.model.mesh.size, "step": shape.name}
    return named | {"tokens": tokens, "length": shape.length}


def _time(step: Step, day: Day) -> float:
    return seconds(step, **day.timing, most_calls=MOST_CALLS)


def _launch(call: Any, calls: int = MOST_CALLS) -> float:
    """Seconds until a call returns, the median of some; the device may be busy long after."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        out = call()
        taken.append(time.perf_counter() - began)
        jax.block_until_ready(out)
    return float(np.median(taken))


def step_bytes(model: Model, shape: Shape) -> int:
    """Bytes that a step must read: weights, of the experts those that even routing touches; KV.

    The draft layer runs once over all tokens, and once more, with the head, a draft.
    """
    c, bucket = model.config, shape.bucket
    tokens = bucket.rows * (bucket.drafts + 1) + bucket.chunk_tokens
    touched = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens
    flat = jax.tree.leaves_with_path(model.params)
    sizes = {path_name(path): array.nbytes for path, array in flat}
    read = 0.0
    for name, size in sizes.items():
        times = 1 + bucket.drafts * (name.startswith("mtp") or "lm_head" in name)
        used = 0 if "embed_tokens" in name else touched if "/experts_" in name else 1
        read += size * used * times
    cached = 0 if bucket.chunk_rows else bucket.rows * shape.length
    return int(read + cached * c.kv_bytes_per_token(drafting=True))
