"""The one place that touches Pallas' Mosaic GPU interface, which moves with each release of JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import PROCESSORS

SMEM, BlockSpec = plgpu.SMEM, plgpu.BlockSpec
emit_pipeline = plgpu.emit_pipeline
# Its type says that the body returns nothing; with a carry it returns the next.
emit_pipeline_warp_specialized: Any = plgpu.emit_pipeline_warp_specialized
copy_out, commit_smem = plgpu.copy_smem_to_gmem, plgpu.commit_smem

SHARED_BYTES = 232_448  # what a block may use on Hopper
WARPGROUP_ROWS = 64  # rows of one wgmma


def launch(
    kernel: Callable[..., None],
    inputs: Sequence[jax.Array],
    output: jax.ShapeDtypeStruct,
    *,
    name: str,
    processors: int = PROCESSORS,
    warpgroups: int = 1,
    scratch: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Run a persistent kernel: `processors` blocks that share out the work themselves.

    Args:
        kernel: (*input references, output reference, **scratch references) -> None. It finds its
            block at axis "block" and, of several, its warpgroup at axis "warpgroup".
        interpret: run in Pallas' interpreter, on a CPU.
    """
    threads: dict[str, Any] = {}
    if warpgroups > 1:
        threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
    run = plgpu.kernel(
        kernel,
        out_type=output,
        grid=(processors,),
        grid_names=("block",),
        scratch_types=dict(scratch or {}),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=name,
        interpret=InterpretGPUParams() if interpret else None,
        **threads,
    )
    return run(*inputs)


def zeros(shape: tuple[int, int], *, interpret: bool) -> jax.Array:
    """A float32 accumulator."""
    values = jnp.zeros(shape, jnp.float32)
    return values if interpret else plgpu.layout_cast(values, plgpu.Layout.WGMMA)


def product(a: Any, b: Any, *, interpret: bool) -> jax.Array:
    """a [M, K] times b [N, K] transposed, of shared memory -> float32 [M, N] on tensor cores.

    The interpreter has no transposed operands.
    """
    if interpret:
        return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T)

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, plgpu.transpose_ref(b, (1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0])))


def spread(
    ref: Any, index: tuple[Any, ...], shape: tuple[int, int], axis: int, *, interpret: bool
) -> jax.Array:
    """The vector ref[index] of global memory, along `axis` of an accumulator's shape.

    The interpreter has no loads with a layout.
    """
    if interpret:
        values = ref[index]
    else:
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        values = plgpu.load(ref, index, layout=layout, optimized=False)
    return lax.broadcast_in_dim(values, shape, (axis,))


def store_transposed(ref: Any, values: jax.Array, *, interpret: bool) -> None:
    """Write an accumulator [M, N] to shared memory [N, M]."""
    if interpret:
        ref[...] = values.T.astype(ref.dtype)
    else:
        turned = plgpu.layout_cast(values.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.transpose_ref(ref, (1, 0))[...] = turned


def wait_copied() -> None:
    """Until this warpgroup's copies to global memory have read their shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
