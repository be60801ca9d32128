"""Matches a checkpoint's tensors with their places, and finds everything that does not fit."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from convert.hf_reader import Source, Tensor
from convert.mapping import Fp8, Place, is_ignored
from convert.report import Fault, Kind
from glmjax.config import ModelConfig, QuantConfig
from glmjax.model.spec import FP8, ParamSpec

_SCALE_SUFFIX = {"compressed-tensors": "_scale", "fp8": "_scale_inv"}
_SCALE_DTYPES = ("float32", "bfloat16", "float8_e8m0fnu")
_EXACT_CASTS = {("bfloat16", "float32"), ("float16", "float32")}
_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Match:
    """A tensor and its place.

    Attributes:
        place: where it goes.
        spec: the leaf it goes to.
        tensor: what is stored; None: missing.
        scale: the scales of an FP8 tensor; None: not FP8, or missing.
    """

    place: Place
    spec: ParamSpec
    tensor: Tensor | None
    scale: Tensor | None

    @property
    def is_fp8(self) -> bool:
        """Whether the tensor is stored in FP8."""
        return self.tensor is not None and self.tensor.dtype == FP8

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape it must have."""
        return self.place.tensor_shape(self.spec.shape)


def match(source: Source, places: Iterable[Place], specs: dict[str, ParamSpec]) -> list[Match]:
    """Find the tensor, and the scales, for every place."""
    suffix = _scale_suffix(source.config)
    matches = []
    for place in places:
        tensor = source.tensors.get(place.tensor)
        is_fp8 = tensor is not None and tensor.dtype == FP8
        scale = source.tensors.get(place.tensor + suffix) if is_fp8 else None
        matches.append(Match(place, specs[place.leaf], tensor, scale))
    return matches


def find_faults(source: Source, matches: list[Match], dtype: str | None) -> list[Fault]:
    """Everything wrong: missing, unused, mis-shaped, of a wrong dtype, unclear quantisation.

    Args:
        dtype: what the user asked to cast to; None: keep what is stored.
    """
    faults = [fault for m in matches for fault in _tensor_faults(m, source.config, dtype)]
    if dtype is None:
        faults += _fusion_faults(matches)
    return list(dict.fromkeys(faults + _unused_faults(source, matches)))


def orphan_scales(source: Source, matches: list[Match]) -> list[str]:
    """Scales of tensors that are not FP8: harmless, and not used."""
    plain = {m.place.tensor for m in matches if m.tensor is not None and not m.is_fp8}
    names = (tensor + suffix for tensor in plain for suffix in _SCALE_SUFFIX.values())
    return sorted(name for name in names if name in source.tensors)


def _scale_suffix(config: ModelConfig) -> str:
    return _SCALE_SUFFIX[config.quant.method if config.quant else "compressed-tensors"]


def _tensor_faults(m: Match, config: ModelConfig, dtype: str | None) -> Iterator[Fault]:
    name = m.place.tensor
    if m.tensor is None:
        yield Fault(Kind.MISSING, name)
        return
    if m.tensor.shape != m.hf_shape:
        detail = f"{list(m.tensor.shape)}, config.json asks for {list(m.hf_shape)}"
        yield Fault(Kind.SHAPE, name, detail)
    if m.is_fp8:
        yield from _fp8_faults(m, config, dtype)
    else:
        yield from _plain_faults(m, m.tensor, config.quant, dtype)


def _plain_faults(
    m: Match, tensor: Tensor, quant: QuantConfig | None, dtype: str | None
) -> Iterator[Fault]:
    stored, wanted = tensor.dtype, m.spec.dtype
    castable = dtype is not None and stored in _FLOATS
    if stored not in _FLOATS:
        yield Fault(Kind.DTYPE, tensor.name, f"{stored}, expected {wanted}")
    elif stored != wanted and not castable and (stored, wanted) not in _EXACT_CASTS:
        detail = f"{stored}, expected {wanted}; --dtype {wanted} casts"
        yield Fault(Kind.DTYPE, tensor.name, detail)
    if quant and m.place.fp8 is Fp8.EXPECTED and not is_listed(quant.ignore, tensor.name):
        detail = f"{stored}, but quantization_config does not list it as unquantised"
        yield Fault(Kind.QUANTIZATION, tensor.name, detail)


def _fp8_faults(m: Match, config: ModelConfig, dtype: str | None) -> Iterator[Fault]:
    name, quant = m.place.tensor, config.quant
    if quant is None:
        yield Fault(Kind.QUANTIZATION, name, "FP8, but config.json has no quantization_config")
        return
    if is_listed(quant.ignore, name):
        yield Fault(Kind.QUANTIZATION, name, "FP8, but quantization_config ignores it")
    if m.place.fp8 is Fp8.NEVER and dtype is None:
        detail = "FP8, which is served for linear layers only; --dtype bfloat16 dequantises"
        yield Fault(Kind.QUANTIZATION, name, detail)
    if m.scale is None:
        yield Fault(Kind.MISSING, name + _scale_suffix(config))
        return
    expected = scale_shape(m.hf_shape, quant.block_size)
    if m.scale.shape != expected:
        detail = f"{list(m.scale.shape)}, expected {list(expected)}"
        yield Fault(Kind.SHAPE, m.scale.name, detail)
    if m.scale.dtype not in _SCALE_DTYPES:
        detail = f"{m.scale.dtype}, expected {' or '.join(_SCALE_DTYPES)}"
        yield Fault(Kind.DTYPE, m.scale.name, detail)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """Shape of the scales of an FP8 tensor: one a row, or one a block."""
    if block is None:
        return (*shape[:-1], 1)
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def is_listed(entries: Iterable[str], tensor: str) -> bool:
    """Whether a tensor's module, or one around it, is named: in full, by its last parts, or "re:".

    Both forms of quantization_config are read this way.
    """
    patterns, names = _by_form(tuple(entries))
    module = tensor.removesuffix(".weight")
    return not names.isdisjoint(_spans(module)) or any(p.match(module) for p in patterns)


@functools.cache
def _by_form(entries: tuple[str, ...]) -> tuple[list[re.Pattern[str]], frozenset[str]]:
    """The patterns among entries, and the names."""
    patterns = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]
    return patterns, frozenset(entry for entry in entries if not entry.startswith("re:"))


def _spans(module: str) -> Iterator[str]:
    """Names made of a module's parts that stand side by side."""
    parts = module.split(".")
    for first, last in itertools.combinations(range(len(parts) + 1), 2):
        yield ".".join(parts[first:last])


def _fusion_faults(matches: list[Match]) -> Iterator[Fault]:
    """Leaves that fuse FP8 tensors with others."""
    fused: dict[str, dict[bool, list[str]]] = defaultdict(lambda: defaultdict(list))
    for m in matches:
        if m.tensor is not None:
            fused[m.place.leaf][m.is_fp8].append(m.place.tensor)
    for kinds in fused.values():
        if len(kinds) == 2:
            rarer = min(kinds, key=lambda is_fp8: len(kinds[is_fp8]))
            this, that = ("FP8", "not") if rarer else ("not FP8", "FP8")
            detail = f"{this}, but what it is fused with is {that}; --dtype bfloat16 dequantises"
            for name in kinds[rarer]:
                yield Fault(Kind.QUANTIZATION, name, detail)


def _unused_faults(source: Source, matches: list[Match]) -> list[Fault]:
    used = {t.name for m in matches for t in (m.tensor, m.scale) if t is not None}
    used |= set(orphan_scales(source, matches))
    unused = [
        Fault(Kind.UNUSED, name)
        for name in source.tensors
        if name not in used and not is_ignored(source.config, name)
    ]
    detail = "its file holds it, the index does not list it"
    return unused + [Fault(Kind.UNUSED, name, detail) for name in source.unindexed]
