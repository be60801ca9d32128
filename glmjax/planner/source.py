"""The model to plan for: an official release by its name, or a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from glmjax.checkpoint import MANIFEST, open_converted
from glmjax.config import ModelConfig
from glmjax.errors import ConfigError
from glmjax.releases import release


@dataclass(frozen=True)
class Source:
    """A model whose weights need not be there.

    Attributes:
        name: what the user called it.
        config: without an MTP block `num_nextn_predict_layers` is 0.
        quantized: leaves that are stored in FP8, by path; None: as in an official release.
    """

    name: str
    config: ModelConfig
    quantized: frozenset[str] | None = None


def find(name: str | Path, dtype: str | None = None) -> Source:
    """The model that `name` means.

    Args:
        name: "zai-org/GLM-4.5-FP8" or "GLM-4.5-FP8", a converted folder, or one with the
            config.json of an HF checkpoint.
        dtype: to serve it in another than its own.

    Raises:
        ConfigError: neither a release nor a folder, or a config that is not served.
        CheckpointError: a damaged converted folder.
    """
    text, folder = str(name), Path(name)
    if (folder / MANIFEST).is_file():
        converted = open_converted(folder, dtype)
        return Source(text, converted.config, frozenset(converted.manifest.quantized))
    if folder.is_dir():
        return Source(text, _cast(ModelConfig.from_hf(folder), dtype))
    try:
        return Source(text, _cast(release(text), dtype))
    except ConfigError as error:
        raise ConfigError(f"no folder, and {error}") from None


def _cast(config: ModelConfig, dtype: str | None) -> ModelConfig:
    return replace(config, dtype=dtype or config.dtype)
