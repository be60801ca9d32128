"""Restores a converted checkpoint straight into shardings, a group at a time.

Each device reads its own part of every array; what the host holds is the part of one group that is
on its way to the devices. Only KV heads that a mesh repeats are read whole, and cut on the devices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from glmjax.checkpoint import PARAMS, Converted, check_files, locate, open_converted
from glmjax.config import ModelConfig
from glmjax.errors import CheckpointError, ConfigError
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.quant import QuantArray
from glmjax.model.spec import abstract, path_name, quantize_specs, specs_of
from glmjax.runner.kv_heads import repeat, tensor_size, unsplit
from glmjax.sharding import named_sharding, partition_spec

logger = logging.getLogger(__name__)

Params = dict[Any, Any]
_LOG_EVERY_S = 10.0


def read_config(folder: str | Path, dtype: str | None = None) -> ModelConfig:
    """The config of a converted folder as stored, KV heads not repeated. Raises as `load` does."""
    return open_converted(folder, dtype).config


def load(
    folder: str | Path, mesh: Mesh, dtype: str | None = None, *, expert_parallel: bool = False
) -> tuple[ModelConfig, Params]:
    """Restore the main model of a converted folder.

    Args:
        dtype: "float32" or "bfloat16", to cast to; FP8 values, their scales and the correction
            bias keep their dtype. None: as stored.
        expert_parallel: whole experts on each device, rather than a part of every expert's width.

    Returns:
        The config as `mesh` runs it (`ModelConfig.replicated`, `expert_parallel`), and arrays on
        `mesh` in its shapes and the structure of `decoder_specs`. Where KV heads are repeated the
        tree is for running: trained, the copies of a head would part.

    Raises:
        CheckpointError: not a converted folder, unfinished, or files missing or damaged.
        ConfigError: an unusable config.json, or `mesh` does not divide the model.
    """
    converted = _open(folder, dtype, expert_parallel)
    params = _restore(converted, decoder_specs(converted), "", mesh)
    return converted.config.replicated(tensor_size(mesh)), params


def load_mtp(
    folder: str | Path, mesh: Mesh, dtype: str | None = None, *, expert_parallel: bool = False
) -> Params:
    """Restore the MTP block, in the structure of `mtp_specs`; laid out as `load` lays out.

    Raises as `load` does, and CheckpointError when the folder has no MTP block.
    """
    converted = _open(folder, dtype, expert_parallel)
    if not converted.manifest.has_mtp:
        raise CheckpointError(f"{folder} has no MTP block; serve it without drafting")
    return _restore(converted, mtp_specs(converted), "mtp/", mesh)


def _open(folder: str | Path, dtype: str | None, expert_parallel: bool) -> Converted:
    converted = open_converted(folder, dtype)
    config = replace(converted.config, expert_parallel=expert_parallel)
    return replace(converted, config=config)


def decoder_specs(converted: Converted) -> Params:
    """`specs_of(Decoder)`, with `QuantArray`s for the leaves that are stored in FP8."""
    manifest = converted.manifest
    specs = specs_of(Decoder(converted.config))
    return quantize_specs(specs, manifest.quantized, manifest.block)


def mtp_specs(converted: Converted) -> Params:
    """`specs_of(MTP)`, with `QuantArray`s for the leaves that are stored in FP8."""
    manifest = converted.manifest
    paths = {path.removeprefix("mtp/") for path in manifest.quantized if path.startswith("mtp/")}
    return quantize_specs(specs_of(MTP(converted.config)), paths, manifest.block)


def _restore(converted: Converted, specs: Params, root: str, mesh: Mesh) -> Params:
    flat, structure = jax.tree.flatten_with_path(specs)
    wanted = {root + path_name(path): spec for path, spec in flat}
    _check_shapes(converted, {path: spec.shape for path, spec in wanted.items()})
    check_blocks(specs, tensor_size(mesh))
    kv_heads = converted.config.replicated(tensor_size(mesh)).num_key_value_heads
    targets = abstract({p: unsplit(p, spec, kv_heads) for p, spec in wanted.items()}, mesh)
    _check_divisible(targets, mesh)
    groups: dict[str, dict[str, str]] = {}
    for path in wanted:
        group, key = locate(path)
        groups.setdefault(group, {})[key] = path
    check_files(converted, groups)

    def place(path: str, array: jax.Array) -> jax.Array:
        return repeat(path, array, kv_heads, named_sharding(mesh, wanted[path].axes))

    arrays = _restore_groups(converted, groups, targets, place)
    return jax.tree.unflatten(structure, [arrays[path] for path in wanted])


def _restore_groups(
    converted: Converted,
    groups: dict[str, dict[str, str]],
    targets: dict[str, Any],
    place: Callable[[str, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Restore `groups`, each passed through `place` before the next is read."""
    arrays: dict[str, jax.Array] = {}
    start = last = time.monotonic()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for count, (group, paths) in enumerate(groups.items(), 1):
            folder = converted.folder.absolute() / PARAMS / group
            wanted = {key: targets[path] for key, path in paths.items()}
            restored = _restore_group(checkpointer, folder, wanted)
            arrays |= {path: place(path, restored[key]) for key, path in paths.items()}
            if time.monotonic() - last > _LOG_EVERY_S:
                last = time.monotonic()
                logger.info("%s: %d of %d groups restored", converted.folder, count, len(groups))
    jax.block_until_ready(arrays)
    size = sum(array.nbytes for array in arrays.values())
    elapsed = time.monotonic() - start
    logger.info("%s: %.1f GB restored in %.1f s", converted.folder, size / 1e9, elapsed)
    return arrays


def _restore_group(
    checkpointer: ocp.Checkpointer, folder: Path, targets: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    try:
        return checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
        )
    except jax.errors.JaxRuntimeError:
        raise  # a device out of memory says nothing about the files
    except Exception as error:  # Orbax raises bare Exceptions for files it cannot read
        cause = error.__cause__ or error
        raise CheckpointError(f"{folder} cannot be read: {cause}; convert again") from error


def _check_shapes(converted: Converted, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = converted.manifest.arrays
    faults = [
        f"{path}: config.json asks for {list(shape)}, stored is "
        + (str(list(stored[path].shape)) if path in stored else "nothing")
        for path, shape in shapes.items()
        if path not in stored or stored[path].shape != shape
    ]
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"{converted.folder / 'config.json'} is not that of the arrays stored with it:\n  "
            + "\n  ".join(faults[:10])
            + f"{more}\nPut back the config.json of the checkpoint, or convert again"
        )


def check_blocks(specs: Params, tensor: int) -> None:
    """A device has the scales of whole blocks, so its columns must be whole blocks too.

    Raises:
        ConfigError: `tensor` devices cut a leaf of `specs` within a block.
    """
    leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    for path, leaf in leaves:
        if isinstance(leaf, QuantArray) and leaf.block:
            is_cut = partition_spec(leaf.values.axes)[-1] is not None
            parts, columns = tensor if is_cut else 1, leaf.values.shape[-1]
            if parts > 1 and columns % (parts * leaf.block):
                raise ConfigError(
                    f"{path_name(path)}: tensor parallel {parts} cuts its {columns} columns within "
                    f"FP8 blocks of {leaf.block}; choose a smaller tensor-parallel size"
                )


def _check_divisible(targets: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> None:
    """Say which array a mesh does not divide, before JAX says it about a shape."""
    faults = []
    for path, target in targets.items():
        extents = zip(target.shape, target.sharding.spec, strict=True)
        uneven = [n for n, axis in extents if axis is not None and n % mesh.shape[axis]]
        if uneven:
            faults.append(f"{path} {list(target.shape)}")
    if faults:
        raise ConfigError(
            f"a mesh of {dict(mesh.shape)} does not divide {len(faults)} arrays, such as "
            f"{faults[0]}; choose a smaller tensor-parallel size"
        )
