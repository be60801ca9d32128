"""BF16 checkpoints that are quantised to FP8 are what the official FP8 releases would be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import (
    FP8,
    TINY,
    draw,
    fp8_tree,
    is_linear,
    quantise,
    quantization_config,
    tree,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from restored import assert_same, restored
from safetensors.numpy import save_file

from convert import quantise as quantiser
from convert.hf_reader import Tensor, read_header
from convert.hf_to_orbax import convert, main, verify
from convert.quantise import quantised, read_quantised, read_row_scales, row_scales
from glmjax.checkpoint import open_converted
from glmjax.config import QuantConfig
from glmjax.errors import CheckpointError

BF16 = ml_dtypes.bfloat16
# E4M3 from its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F is no number
E4M3 = sorted(
    (8 + mantissa if exponent else mantissa) / 8 * 2.0 ** (max(exponent, 1) - 7)
    for exponent in range(16)
    for mantissa in range(8)
    if (exponent, mantissa) != (15, 7)
)


def half_steps(values: np.ndarray) -> np.ndarray:
    """Half the distance of two E4M3 numbers at these magnitudes, float64."""
    exponents = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    return 2.0**exponents / 16


def nearest(ratio: float) -> float:
    """The E4M3 number nearest to `ratio`, of two the one whose last bit is 0."""
    best = min(E4M3, key=lambda value: (abs(value - abs(ratio)), E4M3.index(value) % 2))
    return math.copysign(best, ratio)


# What bfloat16 holds, of any size: the subnormal, the largest, and zeros
weights = st.integers(0, 2**16 - 1).map(lambda bits: np.uint16(bits).view(BF16))
finite = weights.filter(lambda weight: np.isfinite(np.float32(weight)))
rows_of_weights = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(rows_of_weights)
@settings(deadline=None, max_examples=200)
def test_any_weight_is_within_half_a_step(rows):
    weights = np.array(rows, np.float32)
    scales = row_scales(weights)
    values = quantised(weights, scales)
    assert (scales.dtype, scales.shape, values.dtype) == (np.float32, (len(rows), 1), FP8)
    assert np.isfinite(scales).all()
    ratios = weights.astype(np.float64) / scales
    found = values.astype(np.float64)
    bound = half_steps(ratios) * (1 + 1e-5)  # the quotient is a float32
    assert (np.abs(found - ratios) <= bound).all()
    assert (np.abs(found * scales - weights) <= bound * scales).all()


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=8))
@settings(deadline=None)
def test_rounding_is_to_the_nearest_of_the_two_the_even_one(ratios):
    found = quantised(np.array([ratios], np.float32), np.ones((1, 1), np.float32))
    assert found[0].astype(float).tolist() == [nearest(ratio) for ratio in ratios]


def test_halfway_is_even():
    ratios = np.array([[17.0, 19.0, 432.0, 2.0**-10, 3 * 2.0**-10, -17.0]], np.float32)
    found = quantised(ratios, np.ones((1, 1), np.float32))
    assert found[0].astype(float).tolist() == [16.0, 20.0, 448.0, 0.0, 2.0**-8, -16.0]


def test_scales_of_rows_that_are_not_ordinary():
    largest, least = np.float32(BF16(3.38e38)), np.float32(2.0**-133)
    rows = np.array([[0, -0.0], [448, -1], [1, -896], [largest, 1], [least, 0]], np.float32)
    scales = row_scales(rows)
    assert scales[:3, 0].tolist() == [1.0, 1.0, 2.0]
    assert scales[4, 0] == 1.0, "a subnormal scale would be off by a half"
    assert quantised(rows, scales).astype(float)[:, 0].tolist() == [0.0, 448.0, 0.5, 448.0, 0.0]


def test_what_is_too_large_for_its_scale_is_clamped():
    found = quantised(np.array([[1e9, -1e9]], np.float32), np.ones((1, 1), np.float32))
    assert found.astype(float).tolist() == [[448.0, -448.0]]


@given(st.integers(1, 40), st.sampled_from([np.s_[:, :-1], np.s_[:, -1], np.s_[1], np.s_[:]]))
@settings(deadline=None, max_examples=30)
def test_any_part_of_a_leaf_is_filled_some_rows_at_a_time(tmp_path_factory, elements, index):
    """Parts of a fused leaf are not contiguous; block sizes divide nothing."""
    values, scales = np.zeros((2, 3, 5, 7), FP8), np.zeros((2, 3, 5, 1), np.float32)
    part = values[index]
    weight = np.random.default_rng(0).standard_normal((part.size // 7, 7)).astype(BF16)
    folder = tmp_path_factory.mktemp("one")
    tensor = one_tensor(folder, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiser, "BLOCK_ELEMENTS", elements)
        read_quantised(tensor, values[index])
        read_row_scales(tensor, scales[index])
    wide = weight.astype(np.float32)
    np.testing.assert_array_equal(scales[index].reshape(-1, 1), row_scales(wide))
    np.testing.assert_array_equal(
        values[index].reshape(-1, 7).view(np.uint8),
        quantised(wide, row_scales(wide)).view(np.uint8),
    )


def one_tensor(folder: Path, weight: np.ndarray) -> Tensor:
    """A file of one tensor."""
    save_file({"weight": weight}, folder / "one.safetensors")
    return read_header(folder / "one.safetensors")[0]


# Whole checkpoints


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "hf", TINY, draw(TINY))


def test_it_is_the_fp8_release_of_the_same_weights(source, tmp_path):
    """The same tree as from a checkpoint that was quantised before it was converted."""
    manifest = convert(source, tmp_path / "out", quantize="fp8")
    assert_same(restored(tmp_path / "out"), fp8_tree(TINY, quantise(draw(TINY), None)))
    settings = quantization_config(None, draw(TINY))
    release = write(
        tmp_path / "release", TINY, quantise(draw(TINY), None), quantization_config=settings
    )
    assert manifest == convert(release, tmp_path / "converted")


def test_it_serves_as_quantised_though_its_config_says_nothing(source, tmp_path):
    convert(source, tmp_path / "out", quantize="fp8")
    assert open_converted(tmp_path / "out").config.quant == QuantConfig("compressed-tensors")


@pytest.mark.parametrize("config", [TINY, replace(TINY, dtype="float32")], ids=["bf16", "f32"])
def test_the_rest_is_cast_when_asked(config, tmp_path):
    source = write(tmp_path / "hf", config, draw(config))
    convert(source, tmp_path / "out", "bfloat16", quantize="fp8")
    expected = fp8_tree(config, quantise(draw(config), None))
    found = restored(tmp_path / "out")
    for path, array in expected.items():
        same = array.dtype == FP8 or path.endswith(("scale", "correction_bias"))
        np.testing.assert_array_equal(found[path], array if same else array.astype(BF16), path)
    assert verify(source, tmp_path / "out").tensors == len(draw(config))


def test_verify_compares_with_what_quantising_gives(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(source), str(out), "--quantize", "fp8", "--verify"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("of its weights in FP8")
    assert second.endswith(f"all equal to those of {source}, quantised")
    for array, tensors in (("values", 6), ("scale", 6)):
        file = next((out / "params" / "layer_00001" / f"mlp.experts_down_proj.{array}").glob("0*"))
        whole = file.read_bytes()
        file.write_bytes(bytes(len(whole)))
        assert main([str(source), str(out), "--verify"]) == 1
        assert f"differs from its source in {tensors} tensors" in capsys.readouterr().err
        file.write_bytes(whole)
    assert main([str(source), str(out), "--verify"]) == 0


def test_fp8_is_not_quantised_again(tmp_path):
    settings = quantization_config(None, draw(TINY))
    release = write(tmp_path / "hf", TINY, quantise(draw(TINY), None), quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"is FP8 already \(compressed-tensors\).*--quantize"):
        convert(release, tmp_path / "out", quantize="fp8")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_weights_that_are_no_numbers_are_named(poison, tmp_path):
    stored = draw(TINY)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    stored[name][2, 3] = poison
    source = write(tmp_path / "hf", TINY, stored)
    with pytest.raises(CheckpointError, match=f"{name} holds infinities or NaN"):
        convert(source, tmp_path / "out", quantize="fp8")


@pytest.mark.parametrize(("first", "second"), [("fp8", None), (None, "fp8")])
def test_a_conversion_goes_on_with_the_same_choice_only(first, second, source, tmp_path):
    convert(source, tmp_path / "out", quantize=first)
    partial = tmp_path / "out.partial"
    (tmp_path / "out").rename(partial)
    (partial / "glmjax.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in partial.rglob("params/*/*/*")}
    made, asked = (f"with{'' if c else 'out'} --quantize" for c in (first, second))
    with pytest.raises(CheckpointError, match=f"conversion {made}.* this one is {asked}"):
        convert(source, tmp_path / "out", quantize=second)
    convert(source, tmp_path / "out", quantize=first)
    moved = {path: (tmp_path / "out" / path.relative_to(partial)) for path in kept}
    assert {path: new.stat().st_mtime_ns for path, new in moved.items()} == kept, "written twice"
    verify(source, tmp_path / "out")


def test_linear_layers_and_nothing_else(source, tmp_path):
    manifest = convert(source, tmp_path / "out", quantize="fp8")
    linear = {name for name in draw(TINY) if is_linear(name)}
    leaves = tree(TINY, {n: np.full(a.shape, n in linear) for n, a in draw(TINY).items()})
    assert set(manifest.quantized) == {
        path for path, quantised in leaves.items() if quantised.any()
    }
