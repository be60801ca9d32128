"""What a conversion will write: every stored array, and where its parts come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from convert.check import Match, find_faults, match, orphan_scales
from convert.chunking import chunk_shape, tensor_parts
from convert.hf_reader import Source, Tensor, read_cast, read_dequantised, read_scales
from convert.mapping import Fp8, Index, is_ignored, mtp_prefix, places
from convert.quantise import read_quantised, read_row_scales
from convert.report import collapse, report
from glmjax.checkpoint import Manifest, StoredArray, locate
from glmjax.config import ModelConfig
from glmjax.errors import CheckpointError
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import ParamSpec, path_name, quantized, specs_of

Fill = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class Piece:
    """One tensor's part of a stored array.

    Attributes:
        tensor: HF name.
        index: its part of the array.
        fill: reads it, cast or scaled as it must be, into an array of that part's shape.
    """

    tensor: str
    index: Index
    fill: Fill


@dataclass(frozen=True)
class Array:
    """A stored array and the pieces that make it up."""

    stored: StoredArray
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        manifest: what the folder will hold.
        groups: group -> key within it -> array.
        notes: what the user should know, a line each.
    """

    manifest: Manifest
    groups: dict[str, dict[str, Array]]
    notes: tuple[str, ...]


def make_plan(source: Source, dtype: str | None = None, quantize: str | None = None) -> Plan:
    """Check a checkpoint's headers and plan its conversion.

    Args:
        dtype: cast to "bfloat16" or "float32", and dequantise; None: keep what is stored.
        quantize: "fp8": quantise what the official FP8 releases do; None: nothing.

    Raises:
        CheckpointError: one report of every tensor that is missing, unused, mis-shaped, of a wrong
            dtype or unclear in its quantisation; or `quantize` of what is quantised already.
    """
    if quantize and source.config.quant:
        raise CheckpointError(
            f"{source.folder} is FP8 already ({source.config.quant.method}), and stays so; leave "
            "--quantize out"
        )
    has_mtp, notes = _find_mtp(source)
    config = replace(source.config, dtype=dtype or source.config.dtype)
    specs = flat_specs(config, has_mtp)
    matches = match(source, places(config, specs), specs)
    faults = find_faults(source, matches, dtype)
    if faults:
        raise CheckpointError(report(source.folder, faults))
    fp8 = {m.place.leaf for m in matches if _stays_fp8(m, dtype) or _becomes_fp8(m, quantize)}
    arrays = _arrays(matches, config, fp8)
    stored = {path: array.stored for path, array in arrays.items()}
    block_columns = _block(config)[1] if fp8 else None
    manifest = Manifest(config.dtype, has_mtp, tuple(sorted(fp8)), block_columns, stored)
    return Plan(manifest, _by_group(arrays), notes + _orphan_notes(source, matches))


def _stays_fp8(m: Match, dtype: str | None) -> bool:
    return m.is_fp8 and dtype is None


def _becomes_fp8(m: Match, quantize: str | None) -> bool:
    """Whether the official FP8 releases quantise this tensor, and so are we to."""
    return quantize is not None and m.place.fp8 is Fp8.EXPECTED


def _find_mtp(source: Source) -> tuple[bool, tuple[str, ...]]:
    """Whether the MTP block that the config claims is there, and what to say if not."""
    config, prefix = source.config, mtp_prefix(source.config)
    if config.num_nextn_predict_layers == 0:
        return False, ()
    if any(n.startswith(prefix) and not is_ignored(config, n) for n in source.tensors):
        return True, ()
    beside = sorted({f.name for f in source.folder.glob("*.safetensors")} - _names(source))
    hint = f"; {', '.join(beside)} lies there, but the index does not name it" if beside else ""
    return False, (
        f"config.json claims an MTP block (num_nextn_predict_layers 1), but no tensor is named "
        f"{prefix}*{hint}. Converting without it: the model will be served without drafting",
    )


def _names(source: Source) -> set[str]:
    return {file.name for file in source.files}


def _orphan_notes(source: Source, matches: list[Match]) -> tuple[str, ...]:
    lines = collapse(orphan_scales(source, matches))
    return tuple(f"{line} is left out: its weight is not FP8" for line in lines)


def flat_specs(config: ModelConfig, has_mtp: bool) -> dict[str, ParamSpec]:
    """Every leaf of a model's trees by path, those of the MTP block under "mtp/"."""
    tree = specs_of(Decoder(config)) | ({"mtp": specs_of(MTP(config))} if has_mtp else {})
    return {path_name(path): spec for path, spec in jax.tree.leaves_with_path(tree)}


def _arrays(matches: list[Match], config: ModelConfig, fp8: set[str]) -> dict[str, Array]:
    """Every stored array by path; the leaves in `fp8` are FP8."""
    by_leaf: dict[str, list[Match]] = defaultdict(list)
    for m in matches:
        by_leaf[m.place.leaf].append(m)
    arrays: dict[str, Array] = {}
    for leaf, parts in by_leaf.items():
        arrays |= _quantised(leaf, parts, config) if leaf in fp8 else _plain(leaf, parts, config)
    return arrays


def _plain(leaf: str, matches: list[Match], config: ModelConfig) -> dict[str, Array]:
    """A leaf that is stored as one array, dequantised if it has to be."""
    rows, columns = _block(config)

    def fill(m: Match) -> Fill:
        if not m.is_fp8:
            return partial(read_cast, _found(m.tensor))
        block = (rows, columns or m.hf_shape[-1])
        return partial(read_dequantised, _found(m.tensor), _found(m.scale), block)

    return {leaf: _array(matches[0].spec, config, [(m, fill(m)) for m in matches])}


def _quantised(leaf: str, matches: list[Match], config: ModelConfig) -> dict[str, Array]:
    """An FP8 leaf: an array of values and one of scales, as they are stored or made of floats."""
    rows, columns = _block(config)
    specs = quantized(matches[0].spec, columns)

    def values(m: Match) -> Fill:
        return partial(read_cast if m.is_fp8 else read_quantised, _found(m.tensor))

    def scales(m: Match) -> Fill:
        if not m.is_fp8:
            return partial(read_row_scales, _found(m.tensor))
        return partial(read_scales, _found(m.scale), rows)

    return {
        f"{leaf}/values": _array(specs.values, config, [(m, values(m)) for m in matches]),
        f"{leaf}/scale": _array(specs.scale, config, [(m, scales(m)) for m in matches]),
    }


def _block(config: ModelConfig) -> tuple[int, int | None]:
    """Rows and columns that share a scale; None: all columns."""
    return (config.quant and config.quant.block_size) or (1, None)


def _array(spec: ParamSpec, config: ModelConfig, fills: list[tuple[Match, Fill]]) -> Array:
    stored = StoredArray(spec.shape, spec.dtype, chunk_shape(spec, tensor_parts(config)))
    return Array(stored, tuple(Piece(m.place.tensor, m.place.index, fill) for m, fill in fills))


def _found(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a plan is made only of tensors that were found"
    return tensor


def _by_group(arrays: dict[str, Array]) -> dict[str, dict[str, Array]]:
    groups: dict[str, dict[str, Array]] = defaultdict(dict)
    for path, array in arrays.items():
        group, key = locate(path)
        groups[group][key] = array
    return dict(groups)
