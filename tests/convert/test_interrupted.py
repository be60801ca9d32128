"""Conversions in a real process that is killed, interrupted, out of disk or short of memory."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hf_checkpoints import INDEX, SMALL, TINY, draw, write

from convert.hf_to_orbax import convert, verify
from glmjax.bench.synthetic import mtp_tensors, tensors
from glmjax.checkpoint import open_converted
from glmjax.errors import CheckpointError

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "convert" / "hf_to_orbax.py")
COMMAND = [sys.executable, SCRIPT]
LONG = replace(TINY, num_hidden_layers=40, num_nextn_predict_layers=0)


def start(*arguments: object, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    whole = [*command, *map(str, arguments)]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, command: list[str] = COMMAND) -> tuple[int, str]:
    """Exit status and stderr."""
    process = start(*arguments, command=command)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def signal_at(process: subprocess.Popen[str], group: Path, number: signal.Signals) -> None:
    """Send a signal once `group` is written."""
    while not group.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)


def stop_at(process: subprocess.Popen[str], group: Path, stop: signal.Signals) -> str:
    """Stop it once `group` is written; returns stderr."""
    signal_at(process, group, stop)
    return process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of many layers."""
    return write(tmp_path_factory.mktemp("long") / "hf", LONG, draw(LONG))


def test_killed_then_resumed(source, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(source, out)
    stop_at(process, partial / "params" / "layer_00003", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CheckpointError, match="interrupted"):
        open_converted(out)
    done = {path: path.stat().st_mtime_ns for path in (partial / "params").glob("layer_*/*/0*")}
    assert done

    status, errors = run(source, out)
    assert status == 0, errors
    assert "groups are written already" in errors
    assert not partial.exists()
    for path, written_ns in done.items():
        moved = out / path.relative_to(partial)
        assert moved.stat().st_mtime_ns == written_ns, "written twice"
    assert verify(source, out).tensors == len(draw(LONG))


def test_ctrl_c_is_one_line_and_130(source, tmp_path):
    process = start(source, tmp_path / "out")
    group = tmp_path / "out.partial" / "params" / "layer_00002"
    errors = stop_at(process, group, signal.SIGINT)
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if line]
    assert lines == ["interrupted: the same command goes on where it stopped"]
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")


def test_one_at_a_time(source, tmp_path):
    group = tmp_path / "out.partial" / "params" / "layer_00001"
    with start(source, tmp_path / "out") as process:
        try:
            signal_at(process, group, signal.SIGSTOP)  # else it may be done too soon
            with pytest.raises(CheckpointError, match="another conversion is writing"):
                convert(source, tmp_path / "out")
        finally:
            process.kill()


def test_a_changed_source_starts_again(tmp_path, caplog):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    convert(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "glmjax.json").unlink()
    other = write(source, TINY, draw(TINY, seed=1))
    with caplog.at_level("INFO", "convert"):
        convert(other, tmp_path / "out")
    assert "was made from another source or dtype: starting again" in caplog.text
    verify(other, tmp_path / "out")


def test_the_last_rename_is_resumed_too(tmp_path):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    convert(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    convert(source, tmp_path / "out")
    verify(source, tmp_path / "out")


def test_half_cleared_work_is_never_taken_for_whole(tmp_path, monkeypatch):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    convert(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    rmtree = shutil.rmtree

    def killed(path, **options):
        rmtree(path / "layer_00001")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", dtype="float32")
    monkeypatch.undo()
    convert(source, tmp_path / "out")
    verify(source, tmp_path / "out")


def test_an_interrupted_removal_does_not_block_the_next_overwrite(tmp_path):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    convert(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "out.replaced")
    shutil.rmtree(tmp_path / "out.replaced" / "params")
    convert(source, tmp_path / "out", overwrite=True)
    verify(source, tmp_path / "out")
    assert not (tmp_path / "out.replaced").exists()


def test_places_that_cannot_be_replaced_are_refused_at_once(tmp_path):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="is a link or a mount point"):
        convert(source, tmp_path / "link")
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"out\.replaced is needed for the work"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out.replaced" / "thesis.tex").exists()


# Disks


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint with matrices of a few MB."""
    return write(tmp_path_factory.mktemp("wide") / "hf", SMALL, draw(SMALL))


LIMITED = [
    sys.executable,
    "-c",
    "import resource, runpy\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    f"runpy.run_path({SCRIPT!r}, run_name='__main__')",
]


def test_a_full_disk(wide, tmp_path):
    """A limit on the size of files stands in for a full disk: writes fail in the same place."""
    out = tmp_path / "out"
    status, errors = run(wide, out, command=LIMITED)
    assert status == 1
    message = errors.splitlines()[-1]
    assert message.startswith(f"error: cannot write to {out}.partial: File too large. ")
    assert "bytes are still to be written" in message
    assert "Traceback" not in errors
    assert not out.exists()
    convert(wide, out)
    verify(wide, out)


def test_a_full_file_system(wide, tmp_path):
    """A real one, where mounting is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root; test_a_full_disk covers the same path")
    try:
        filler = small / "filler"
        filler.write_bytes(bytes(1 << 22))
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(wide, small / "out", "bfloat16")
        written = list((small / "out.partial").rglob("*"))
        assert not any("layer" in path.name for path in written), "checked before writing"
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_room_is_checked_before_writing(tmp_path):
    """A sparse file claims more than any disk has."""
    config = replace(TINY, vocab_size=1 << 37, num_nextn_predict_layers=0)
    source = write_sparse(tmp_path / "hf", config, ["model.embed_tokens.weight", "lm_head.weight"])
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        convert(source, tmp_path / "out")
    needed = 2 * config.vocab_size * config.hidden_size * 2
    assert f"{needed:,}"[:5] in str(caught.value)
    assert not (tmp_path / "out.partial" / "params").exists()


def write_sparse(folder: Path, config, names: list[str]) -> Path:
    """A checkpoint where `names`, of vocab_size rows each, are holes in a file of their own."""
    rest = {n: a for n, a in draw(replace(config, vocab_size=1)).items() if n not in names}
    source = write(folder, config, rest, shards=1)
    size = config.vocab_size * config.hidden_size * 2
    header = json.dumps(
        {
            name: {
                "dtype": "BF16",
                "shape": [config.vocab_size, config.hidden_size],
                "data_offsets": [0, size],
            }
            for name in names
        }
    ).encode()
    with open(source / "sparse.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    index = source / INDEX
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": listed | dict.fromkeys(names, "sparse.safetensors")})
    )
    return source


# Memory

MEASURE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from convert.hf_to_orbax import convert

def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

warm, source, out = sys.argv[1:]
convert(warm, out + "-warm")
before = peak_bytes()
convert(source, out)
print(peak_bytes() - before)
"""


def test_memory_is_that_of_two_layers(tmp_path):
    """A checkpoint many times what two layers take."""
    config = replace(
        TINY,
        hidden_size=256,
        moe_intermediate_size=1024,
        num_hidden_layers=20,
        n_routed_experts=6,
        n_shared_experts=1,
    )
    warm = write(tmp_path / "warm", TINY, draw(TINY))
    source = write(tmp_path / "hf", config, zeros(config), shards=4)
    command = [sys.executable, "-c", MEASURE, warm, source, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    arrays = open_converted(tmp_path / "out").manifest.groups()
    layer_bytes = sum(array.size_bytes for array in arrays["layer_00005"].values())
    total_bytes = sum(a.size_bytes for group in arrays.values() for a in group.values())
    slack = 16 << 20  # threads' stacks and what the allocator keeps
    assert total_bytes > 3 * (2 * layer_bytes + slack)
    assert int(result.stdout) < 2 * layer_bytes + slack


def zeros(config) -> dict[str, np.ndarray]:
    """Tensors that are quick to make."""
    return {
        name: np.zeros(noise.shape, "float32" if noise.keep_float32 else config.dtype)
        for name, noise in (tensors(config) | mtp_tensors(config)).items()
    }


def test_work_that_was_being_cleared_asks_for_no_first_command(tmp_path):
    """The record is emptied before the arrays go: nothing says any more how they were made."""
    source, out = write(tmp_path / "hf", TINY, draw(TINY)), tmp_path / "out"
    convert(source, out)
    partial = out.rename(tmp_path / "out.partial")
    (partial / "glmjax.json").unlink()
    (partial / "conversion.json").write_text("")
    convert(source, out, quantize="fp8")
    assert open_converted(out).manifest.quantized
