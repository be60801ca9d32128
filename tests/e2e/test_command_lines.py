"""What a user sees who gives a command something it cannot use."""

from __future__ import annotations

import shutil
import socket

import pytest


def test_help_is_worth_reading(run_command):
    for program in ("serve.py", "convert/hf_to_orbax.py"):
        done = run_command(program, "--help")
        assert done.returncode == 0
        assert "example" in done.stdout.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "0x2"], "mesh 0x2: both axes must be 1 or more"),
        (["--mesh", "8by2"], "expected N (tensor parallel N) or DxT"),
        (["--mesh", "3"], "does not divide num_key_value_heads 8"),
        (["--kv-cache-gib", "0.000001"], "give it more memory"),
        (["--page-size", "0"], "page_size 0 must be 1 or more"),
        (["--chunked-prefill-size", "1"], "chunked_prefill_size is 1, expected 2 or more"),
        (["--max-seq-len", "4000", "--kv-cache-gib", "0.01"], "give the pool more memory"),
    ],
)
def test_serve_refuses_what_cannot_work(run_command, converted, arguments, message):
    done = run_command("serve.py", "--model", converted, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", "99999"), ("--kv-cache-gib", "nan"), ("--drain-timeout-s", "-1")],
)
def test_serve_refuses_values_that_mean_nothing(run_command, option, value):
    done = run_command("serve.py", f"{option}={value}")
    assert done.returncode == 2
    assert f"argument {option}" in done.stderr


def test_serve_says_at_once_that_a_port_is_taken(run_command, converted):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_command("serve.py", "--model", converted, "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "restored" not in done.stderr, "found out before the weights were loaded"


def test_serve_wants_a_converted_folder(run_command, converted, tmp_path):
    hf = converted.with_name("hf")
    cases = {hf: "convert/hf_to_orbax.py", tmp_path / "none": "is not a folder"}
    for folder, message in cases.items():
        done = run_command("serve.py", "--model", folder)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_names_a_damaged_file(run_command, converted, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    data = max((broken / "params").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    done = run_command("serve.py", "--model", broken)
    assert done.returncode == 1
    assert str(broken) in done.stderr
    assert "Traceback" not in done.stderr
