"""What a user sees: exit status, messages, progress, refusals."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hf_checkpoints import TINY, draw, quantise, quantization_config, write

from convert.hf_to_orbax import main
from convert.progress import _line_writer
from glmjax.checkpoint import open_converted

SCRIPT = Path(__file__).parents[2] / "convert" / "hf_to_orbax.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("source") / "hf", TINY, draw(TINY))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A finished conversion, to be copied by those who change it."""
    target = tmp_path_factory.mktemp("finished") / "out"
    assert main([str(source), str(target)]) == 0
    return target


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def run(capsys):
    """Run the command line here: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def test_converts_and_verifies(run, source, tmp_path):
    status, output, errors = run(source, tmp_path / "out", "--verify")
    assert status == 0
    lines = output.splitlines()
    size = sum(a.size_bytes for a in open_converted(tmp_path / "out").manifest.arrays.values())
    assert lines[0].endswith(f"arrays, {size:,} bytes, with its MTP block")
    assert lines[1].endswith(
        f"{len(draw(TINY))} tensors, {size:,} bytes, all equal to those of {source}"
    )
    assert "converting: 100%" in errors
    assert "verifying: 100%" in errors


def test_what_is_there_besides_weights(finished, source):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "conversion.json",
        "glmjax.json",
        "params",
    }
    for name in ("config.json", "tokenizer.json"):
        assert (finished / name).read_bytes() == (source / name).read_bytes()
    groups = {path.name for path in (finished / "params").iterdir()}
    assert groups == {"embed", "head", "vectors", "mtp", *(f"layer_0000{i}" for i in range(3))}


def test_a_finished_folder_is_not_touched(run, source, out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, _, errors = run(source, out)
    assert status == 1
    assert errors.startswith(f"error: {out} is converted already; --overwrite")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_overwrite_replaces_it(run, source, out):
    assert run(source, out, "--overwrite", "--dtype", "float32")[0] == 0
    assert open_converted(out).manifest.dtype == "float32"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert run(source, out, "--verify")[0] == 0


def test_overwriting_may_be_killed_between_its_renames(run, source, out):
    """The old one moved away, the new one not yet in its place."""
    out.rename(out.with_name("out.replaced"))
    assert run(source, out)[0] == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_another_folder_is_never_replaced(run, source, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for options in ([], ["--overwrite"], ["--verify"]):
        status, _, errors = run(source, tmp_path, *options)
        assert (status, "not a converted checkpoint" in errors) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_files_in_the_place_of_the_work(run, source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    status, _, errors = run(source, tmp_path / "out")
    assert (status, "holds other files" in errors) == (1, True)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_an_empty_folder_may_be_filled(run, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(source, tmp_path / "out")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_finds_one_flipped_bit_anywhere(run, source, out):
    files = [path for path in sorted((out / "params").rglob("*")) if path.name[0].isdigit()]
    rng = np.random.default_rng(0)
    for file in rng.choice(np.array(files), 4, replace=False):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        status, _, errors = run(source, out, "--verify")
        assert status == 1, file
        assert "differs from its source in 1 tensors:\n  " in errors, file
        file.write_bytes(whole)
    assert run(source, out, "--verify")[0] == 0


def test_verify_names_what_differs(run, source, out):
    file = next((out / "params" / "layer_00001" / "mlp.experts_down_proj").glob("0*"))
    file.write_bytes(bytes(file.stat().st_size))
    status, _, errors = run(source, out, "--verify")
    assert status == 1
    assert "differs from its source in 6 tensors" in errors
    assert "model.layers.1.mlp.experts.{0..5}.down_proj.weight" in errors


def test_verify_against_another_checkpoint(run, source, out, tmp_path):
    stored = quantise(draw(TINY), None)
    settings = quantization_config(None, stored)
    other = write(tmp_path / "fp8", TINY, stored, quantization_config=settings)
    assert run(other, tmp_path / "fp8-out")[0] == 0
    status, _, errors = run(source, tmp_path / "fp8-out", "--verify")
    assert (status, "was not made from this checkpoint" in errors) == (1, True)


def test_errors_are_one_message(source, tmp_path):
    """In a process of its own: no traceback, no warnings of libraries."""
    command = [sys.executable, SCRIPT, tmp_path / "nowhere", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")
    assert result.stderr.count("\n") == 1


def test_a_target_that_cannot_be_written(run, source, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, errors = run(source, tmp_path / "file" / "out")
    assert status == 1
    assert errors.startswith("error: ")
    assert "Traceback" not in errors


def test_a_bar_on_a_terminal(source, tmp_path):
    main_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, SCRIPT, source, tmp_path / "out"]
    status = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal).returncode
    os.close(terminal)
    shown = os.read(main_end, 1 << 16).decode()
    os.close(main_end)
    assert status == 0
    assert "\r" in shown
    assert "converting: 100%" in shown
    assert "B/s" in shown


def test_lines_now_and_then_otherwise():
    stream = StringIO()
    advance = _line_writer("converting", 100, stream, every_s=0.0)
    advance(25)
    advance(75)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("converting:  25%")
    assert last.startswith("converting: 100%")
    quiet = StringIO()
    advance = _line_writer("converting", 100, quiet, every_s=3600.0)
    advance(25)
    assert quiet.getvalue() == ""


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("IN", "OUT", "--dtype", "--verify", "--overwrite", "OUT.partial"):
        assert word in text
