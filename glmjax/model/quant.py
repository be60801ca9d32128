"""A quantised weight is a pytree, and one `matmul` understands it: layers never ask for a dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import QuantRows, linear, quantize_rows, scaled_linear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """FP8 weights with their scales.

    Attributes:
        values: float8_e4m3fn [..., out, in].
        scale: float32 [..., out, ceil(in / block)].
        block: columns of one output channel that share a scale; None: all of them.
    """

    values: Any
    scale: Any
    block: int | None = field(default=None, metadata={"static": True})


Weight = jax.Array | QuantArray


class Activation(NamedTuple):
    """What enters products with several weights, some of them perhaps in FP8.

    Attributes:
        rows: [T, in].
        quantized: the same for weights that take rows quantised with one scale each, where whoever
            made the rows quantised them as well.
    """

    rows: jax.Array
    quantized: QuantRows | None = None

    def of(self, weight: Weight) -> jax.Array | QuantRows:
        """The form that `weight` is multiplied with."""
        return self.rows if self.quantized is None or not takes_rows(weight) else self.quantized


def takes_rows(weight: Weight) -> bool:
    """Whether `weight` is multiplied with rows that are quantised with one scale each."""
    return isinstance(weight, QuantArray) and weight.block is None


def matmul(
    x: jax.Array | QuantRows, weight: Weight, dtype: DTypeLike, backend: Backend = REF
) -> jax.Array:
    """x [T, in] times weight [..., out, in] -> [T, ..., out] in `dtype`.

    Quantised rows are for weights that `takes_rows`.
    """
    if isinstance(weight, QuantArray):
        rows = x
        if not isinstance(rows, QuantRows):
            rows = quantize_rows(rows, weight.block, backend=backend)
        values, scale = weight.values, weight.scale
        return scaled_linear(rows, values, scale, weight.block, out_dtype=dtype, backend=backend)
    assert not isinstance(x, QuantRows), "a product of FP8 rows and other weights"
    return linear(x, weight).astype(dtype)
