"""Sums over the GPUs present, by size."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from day import Day, Row

from glmjax.sharding import named_sharding, psum_tensor, shard_map
from pallas_kernels.measure import seconds

SIZES = tuple(1 << n for n in range(14, 27, 2))  # bytes: 16 KiB to 64 MiB
IN_A_ROW = 8  # sums of a program, so that launching it costs little


def collectives(day: Day) -> Iterator[Row]:
    """An all-reduce of bfloat16, of each of SIZES bytes a device."""
    mesh = day.mesh()
    if mesh.size == 1:
        yield {"note": "skipped: one device has nobody to sum with"}
        return
    for size in SIZES[:2] if day.rehearse else SIZES:
        program, x = _sums(mesh, size)
        taken = seconds(lambda run=program, x=x: run(x), **day.timing) / IN_A_ROW
        # what a device sends and receives in a ring: NCCL's "bus bandwidth"
        bus = 2 * (mesh.size - 1) / mesh.size * size / taken / 1e9
        row = {"devices": mesh.size, "bytes": size, "taken_us": 1e6 * taken, "gbyte_per_s": bus}
        yield row


def _sums(mesh, size: int):
    """A program of sums that wait for each other, and what it sums."""

    def run(x: jax.Array) -> jax.Array:
        for _ in range(IN_A_ROW):
            x = psum_tensor(x) * 0.5
        return x

    whole = jnp.zeros(size // 2, jnp.bfloat16)
    x = jax.device_put(whole, named_sharding(mesh, (None,)))
    return jax.jit(shard_map(run, mesh, ((None,),), (None,))).lower(x).compile(), x
