"""What a converted checkpoint looks like on disk. numpy and json only, never imports jax.

    OUT/glmjax.json               the manifest: every stored array; written last
    OUT/config.json, tokenizer... as the HF release has them
    OUT/conversion.json           what it was made from
    OUT/params/<group>/           one Orbax checkpoint a group: embed, layer_00000, ..., vectors,
                                  head (final norm and lm_head), mtp

An array is uncompressed zarr: a file a chunk, whose size follows from the manifest. While a
conversion runs everything lies in OUT.partial, which becomes OUT in one rename.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the names bfloat16 and float8_e4m3fn
import numpy as np

from glmjax.config import ModelConfig, QuantConfig
from glmjax.errors import CheckpointError

VERSION = 1
MANIFEST = "glmjax.json"
CONVERSION = "conversion.json"
PARAMS = "params"
CONVERT_COMMAND = "python convert/hf_to_orbax.py"

_TOP_GROUPS = {"embed_tokens": "embed", "norm": "head", "lm_head": "head"}


@dataclass(frozen=True)
class StoredArray:
    """One array on disk.

    Attributes:
        shape: global shape.
        dtype: numpy name of the stored dtype.
        chunks: shape of a chunk, which divides `shape`.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, which is the size of its file."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    def chunk_starts(self) -> Iterator[tuple[int, ...]]:
        """First index of every chunk."""
        ranges = (range(0, n, c) for n, c in zip(self.shape, self.chunks, strict=True))
        return itertools.product(*ranges)

    def chunk_names(self) -> Iterator[str]:
        """File name of every chunk, in the order of `chunk_starts`."""
        counts = (range(n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        return (".".join(map(str, place)) for place in itertools.product(*counts))


@dataclass(frozen=True)
class Manifest:
    """Contents of glmjax.json.

    Attributes:
        dtype: stored dtype of whatever is neither quantised nor always float32.
        has_mtp: whether there is an MTP block.
        quantized: paths of FP8 leaves, such as "layers/1/mlp/experts_down_proj".
        block: columns that share a scale in those; None: one scale an output channel.
        arrays: path -> array; a quantised leaf is two, "<path>/values" and "<path>/scale".
    """

    dtype: str
    has_mtp: bool
    quantized: tuple[str, ...]
    block: int | None
    arrays: dict[str, StoredArray]

    def groups(self) -> dict[str, dict[str, StoredArray]]:
        """Group -> key within it -> array."""
        groups: dict[str, dict[str, StoredArray]] = {}
        for path, array in self.arrays.items():
            group, key = locate(path)
            groups.setdefault(group, {})[key] = array
        return groups


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        folder: where it lies.
        config: the model as it will be loaded: `dtype` is what was asked for, `quant` says what is
            stored, whatever its config.json says, `num_nextn_predict_layers` is 0 without an MTP
            block.
        manifest: what is stored.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest


def locate(path: str) -> tuple[str, str]:
    """Where a leaf of the tree is stored: its group and its key there.

    "layers/3/mlp/gate" -> ("layer_00003", "mlp.gate"); "mtp/enorm" -> ("mtp", "enorm").
    """
    first, *rest = path.split("/")
    if first in _TOP_GROUPS:
        return _TOP_GROUPS[first], ".".join([first, *rest])
    if first == "layers":
        return f"layer_{int(rest[0]):05d}", ".".join(rest[1:])
    return first, ".".join(rest)


def partial_path(folder: Path) -> Path:
    """Where a conversion to `folder` works until it is done."""
    return folder.with_name(folder.name + ".partial")


def open_converted(folder: str | Path, dtype: str | None = None) -> Converted:
    """Read the manifest and config of a converted folder.

    Args:
        folder: what the converter wrote.
        dtype: "float32" or "bfloat16", to load in another dtype than the stored one.

    Raises:
        CheckpointError: no such folder, not converted, unfinished, or a damaged manifest.
        ConfigError: config.json is not that of a model glmjax serves.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = replace(
        ModelConfig.from_hf(folder),
        dtype=dtype or manifest.dtype,
        num_nextn_predict_layers=int(manifest.has_mtp),
    )
    return Converted(folder, replace(config, quant=_quant(config, manifest)), manifest)


def _quant(config: ModelConfig, manifest: Manifest) -> QuantConfig | None:
    """None when nothing is stored quantised; the converter may have quantised a BF16 release."""
    if not manifest.quantized:
        return None
    return config.quant or QuantConfig("compressed-tensors")


def read_manifest(folder: Path) -> Manifest:
    """Read glmjax.json. Raises CheckpointError when `folder` is not a finished conversion."""
    file = folder / MANIFEST
    try:
        raw = json.loads(file.read_text("utf-8"))
        version = raw["version"]
        if version == VERSION:
            return _manifest(raw)
    except OSError as error:
        raise CheckpointError(_why_not_converted(folder, error)) from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}); convert again: {CONVERT_COMMAND} IN {folder} "
            "--overwrite"
        ) from None
    raise CheckpointError(
        f"{file} has layout version {version}, this glmjax reads {VERSION}; convert the HF "
        f"checkpoint again: {CONVERT_COMMAND} IN {folder} --overwrite"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write glmjax.json into `folder`."""
    text = json.dumps({"version": VERSION} | asdict(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def check_files(converted: Converted, groups: Collection[str]) -> None:
    """Stat the files of `groups`.

    Raises:
        CheckpointError: some are missing or have another size; names them.
    """
    stored = converted.manifest.groups()
    absent = [group for group in groups if group not in stored]
    if absent:
        raise CheckpointError(f"{converted.folder} holds no {', '.join(absent)}")
    faults = [
        fault
        for group in groups
        for key, array in stored[group].items()
        for fault in _file_faults(converted.folder / PARAMS / group / key, array)
    ]
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"{converted.folder} is damaged:\n  " + "\n  ".join(faults[:10]) + more + "\n"
            f"Copy it again, or convert again: {CONVERT_COMMAND} IN {converted.folder} --overwrite"
        )


def _file_faults(folder: Path, array: StoredArray) -> Iterator[str]:
    metadata = folder / ".zarray"
    if not _describes(metadata, array):
        yield f"{metadata} is missing or not that of {list(array.shape)} {array.dtype}"
    for name in array.chunk_names():
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError:
            yield f"{file} is missing"
            continue
        if size != array.chunk_bytes:
            yield f"{file} has {size} bytes, expected {array.chunk_bytes}"


def _describes(metadata: Path, array: StoredArray) -> bool:
    """Whether zarr's own metadata of an array agrees with the manifest."""
    try:
        raw = json.loads(metadata.read_text("utf-8"))
        return (raw["shape"], raw["chunks"]) == (list(array.shape), list(array.chunks))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _manifest(raw: dict[str, Any]) -> Manifest:
    arrays = {
        path: StoredArray(tuple(a["shape"]), a["dtype"], tuple(a["chunks"]))
        for path, a in raw["arrays"].items()
    }
    return Manifest(raw["dtype"], raw["has_mtp"], tuple(raw["quantized"]), raw["block"], arrays)


def _why_not_converted(folder: Path, error: OSError) -> str:
    partial = partial_path(folder)
    if not folder.exists() and partial.exists():
        return (
            f"{folder} is not finished: {partial} shows that its conversion was interrupted. Run "
            f"the same {CONVERT_COMMAND} command again; it goes on where it stopped"
        )
    if not folder.is_dir():
        return f"{folder} is not a folder; expected one that {CONVERT_COMMAND} IN OUT wrote"
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors*")):
        return (
            f"{folder} is an HF checkpoint, which has to be converted first: "
            f"{CONVERT_COMMAND} {folder} {folder.absolute().name}-orbax"
        )
    if (folder / CONVERSION).exists():
        return f"{folder} is an unfinished conversion; run its {CONVERT_COMMAND} command again"
    return (
        f"{folder} is not a converted checkpoint: {MANIFEST} cannot be read ({error.strerror}). "
        f"Convert an HF checkpoint: {CONVERT_COMMAND} IN OUT"
    )
