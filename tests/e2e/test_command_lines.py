"""What a user sees who gives a command something it cannot use."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from glmjax.config import SIZES, CacheConfig, SchedulerConfig
from glmjax.errors import ConfigError

SERVE = Path(__file__).parents[2] / "serve.py"


def test_help_is_worth_reading(run_command):
    for program in ("serve.py", "convert/hf_to_orbax.py"):
        done = run_command(program, "--help")
        assert done.returncode == 0
        assert "example" in done.stdout.lower()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], {}),
        (["--speculative-algorithm", "eagle"], {}),
        (["--speculative-algorithm", "NEXTN", "--speculative-eagle-topk", "1"], {}),
        (["--speculative-num-steps", "0"], {"speculative_num_steps": 0}),
        (
            ["--speculative-num-steps", "5", "--speculative-num-draft-tokens", "6"],
            {"speculative_num_steps": 5},
        ),
        (["--disable-radix-cache"], {"prefix_cache": False}),
        (["--deterministic"], {"deterministic": True}),
        (["--enable-deterministic-inference"], {"deterministic": True}),
        (
            ["--max-running-requests", "3", "--max-queued-requests", "4", "--max-seq-len", "50"],
            {"max_running_requests": 3, "max_queued_requests": 4, "max_seq_len": 50},
        ),
        (["--chunked-prefill-size", "99"], {"chunked_prefill_size": 99}),
    ],
)
def test_what_the_options_of_serve_mean(arguments: list[str], fields: dict[str, Any]):
    serve = runpy.run_path(str(SERVE))
    args = serve["parser"]().parse_args(arguments)
    assert serve["scheduler_config"](args, SIZES["cpu"]) == SchedulerConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], {}),
        (["--page-size", "64", "--kv-cache-gib", "0.5"], {"page_size": 64, "memory_bytes": 2**29}),
        (["--kv-cache-dtype", "fp8_e4m3"], {"dtype": "fp8_e4m3"}),
    ],
)
def test_what_the_options_of_the_kv_pool_mean(arguments: list[str], fields: dict[str, Any]):
    serve = runpy.run_path(str(SERVE))
    args = serve["parser"]().parse_args(arguments)
    assert serve["cache_config"](args, SIZES["cpu"]) == CacheConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "0x2"], "mesh 0x2: both axes must be 1 or more"),
        (["--mesh", "8by2"], "expected N (tensor parallel N) or DxT"),
        (["--page-size", "0"], "page_size 0 must be 1 or more"),
        (["--chunked-prefill-size", "1"], "chunked_prefill_size is 1, expected 2 or more"),
        (["--speculative-num-draft-tokens", "8"], "has 4 tokens to verify; give 4 or leave it out"),
        (["--speculative-num-steps", "99"], "expected 0 (no drafting)"),
    ],
)
def test_serve_refuses_what_is_no_configuration(arguments, message):
    serve = runpy.run_path(str(SERVE))
    with pytest.raises(ConfigError, match=re.escape(message)):
        serve["run"](serve["parser"]().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "3"], "does not divide num_key_value_heads 8"),
        (["--kv-cache-gib", "0.000001"], "give it more memory"),
        (["--max-seq-len", "4000", "--kv-cache-gib", "0.01"], "give the pool more memory"),
        (["--kv-cache-gib", "9999", "--max-running-requests", "999999"], "GiB are missing"),
    ],
)
def test_serve_refuses_what_cannot_work(run_command, converted, arguments, message):
    done = run_command("serve.py", "--model", converted, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--port", "99999", "expected 0 to 65535"),
        ("--kv-cache-gib", "nan", "not a number above 0"),
        ("--drain-timeout-s", "-1", "not a number above 0"),
        ("--speculative-eagle-topk", "4", "a draft tree is not served"),
        ("--speculative-algorithm", "MEDUSA", "'EAGLE', 'NEXTN'"),
    ],
)
def test_serve_refuses_values_that_mean_nothing(capsys, option, value, message):
    serve = runpy.run_path(str(SERVE))
    with pytest.raises(SystemExit) as left:
        serve["parser"]().parse_args([f"{option}={value}"])
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert f"argument {option}" in told
    assert message in told


def test_serve_does_not_draft_without_a_block_that_drafts(run_command, converted, tmp_path):
    config = json.loads((converted / "config.json").read_text("utf-8"))
    config["num_nextn_predict_layers"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    done = run_command("serve.py", "--model", tmp_path, "--speculative-algorithm", "EAGLE")
    assert done.returncode == 1
    assert f"{tmp_path} has no MTP block" in done.stderr
    assert "Traceback" not in done.stderr


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
