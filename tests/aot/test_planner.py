"""Plans of real models for GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from described import mesh_of
from glmjax.config import CacheConfig, MeshConfig
from glmjax.errors import ConfigError
from glmjax.planner import report
from glmjax.planner.fitting import largest_temp_bytes
from glmjax.planner.memory import GIB
from glmjax.planner.plan import Plan, Workload, plan
from processes import ROOT

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]

MOST_RESIDENT_KIB = 4 * 2**20
PNG = b"\x89PNG\r\n"
# Prints the most memory that a plan took, in KiB, after what serve.py prints.
MEASURED = """
import resource, runpy, sys
sys.argv[0] = "serve.py"
try:
    runpy.run_path("serve.py", run_name="__main__")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def planned(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`serve.py --plan` as a user runs it, in a process of its own."""
    command = [sys.executable, "-c", MEASURED, "--plan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def air() -> Plan:
    """GLM-4.5-Air in FP8 on two H100."""
    return plan("GLM-4.5-Air-FP8", 2, workload=Workload(batches=(1, 8, 40)))


def test_the_largest_model_is_planned_on_a_laptop(tmp_path):
    """The whole program of GLM-4.5-FP8 on 8 H100, and everything that is said of it."""
    figure = tmp_path / "plan.png"
    model = ("--model", "zai-org/GLM-4.5-FP8", "--mesh", "8", "--device", "h100")
    done = planned(*model, "--json", "--plot", figure)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["smallest_mesh"] == "--mesh 8"
    memory = found["memory"]
    assert 42 * GIB < memory["weights_bytes"] < 43 * GIB
    assert 0 <= memory["left_bytes"] < 10 * 2**20
    assert found["kv_tokens"] > 500_000
    steps = {step["name"]: step for step in found["steps"]}
    assert steps["decode"]["collectives"] == {"all-reduce": 2 * 92 + 2, "all-gather": 1}
    assert 1000 < steps["decode"]["arguments"] < 1300
    assert memory["temp_bytes"] == max(step["temp_bytes"] for step in steps.values())
    assert figure.read_bytes().startswith(PNG)
    assert int(done.stderr.split()[-1]) < MOST_RESIDENT_KIB


def test_a_person_reads_tables(air):
    words = report.text(air)
    assert words.startswith("GLM-4.5-Air-FP8 fits 2 x H100 SXM5 (--mesh 2): ")
    titles = [line for line in words.splitlines() if line.startswith("###")]
    assert [title.split()[1] for title in titles] == [
        "Memory",
        "Requests",
        "Steps",
        "Decoding",
        "Prompts",
        "Drafting",
    ]
    assert "Bounds, not promises" in words


def test_what_runs_is_bounded_by_memory_and_slots(air):
    assert air.limits is not None
    assert air.kv_tokens == (air.limits.pages - 1) * air.limits.page_size
    assert air.requests(8192) == (air.limits.pages - 1) // (8192 // 64)
    assert air.requests(8193) == (air.limits.pages - 1) // (8192 // 64 + 1)


def test_bounds_are_of_what_was_asked(air):
    assert [row.batch for row in air.decode] == [1, 8, 40]
    assert [row.batch for row in air.drafting] == [1, 8, 40]
    assert {step.name for step in air.steps} == {"decode", "verify", "mixed"}
    for step in air.steps:
        assert step.report.launches
        assert step.bound.seconds > 0


def test_a_server_sizes_its_pool_by_the_same_temporaries(air):
    found = largest_temp_bytes(air.deployment, mesh_of("h100", tensor=2))
    assert found == air.memory.temp_bytes


def test_what_is_longer_than_served_is_no_request(air):
    short = replace(air, limits=replace(air.limits, max_seq_len=8192))
    assert short.requests(8192) == air.requests(8192) > 0
    assert short.requests(8193) == 0
    assert air.running(64) == 128 < air.requests(64)


def test_a_plan_is_deterministic_where_the_server_is(air):
    scheduler = replace(air.deployment.scheduler, deterministic=True)
    found = plan("GLM-4.5-Air-FP8", 2, scheduler=scheduler)
    assert found.memory.temp_bytes != air.memory.temp_bytes


def test_fp8_kv_is_planned_on_the_smallest_mesh():
    found = plan("GLM-4.5-Air-FP8", 2, cache=CacheConfig(64, dtype="fp8_e4m3"))
    assert found.kv_tokens > 400_000


def test_data_groups_share_out_the_requests(air):
    two = plan("GLM-4.5-Air-FP8", "2x2", workload=air.workload)
    assert two.memory.weights_bytes == air.memory.weights_bytes
    assert two.requests(8192) > 1.9 * air.requests(8192)


def test_what_does_not_fit_is_told_at_once(air):
    found = plan("GLM-4.5-Air", 2)
    assert (found.fits, found.steps, found.kv_tokens) == (False, (), 0)
    assert found.smallest == MeshConfig(1, 4)
    words = report.text(found)
    assert "does not fit 2 x H100 SXM5 (--mesh 2)" in words
    assert "it fits --mesh 4" in words
    assert json.loads(report.as_json(found))["fits"] is False


def test_more_gpus_than_a_host_has_are_on_several():
    found = plan("GLM-4.5-FP8", 4)
    assert not found.fits
    assert found.smallest == MeshConfig(1, 8)
    assert plan("GLM-4.5", 8).smallest == MeshConfig(1, 16, hosts=2)


def test_serve_says_that_it_does_not_fit():
    done = planned("--model", "GLM-4.5", "--mesh", "8")
    assert done.returncode == 1
    assert "GiB a device are missing" in done.stdout
    assert "--mesh 16 --hosts 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "GLM-9"], "unknown model 'GLM-9'"),
        (["--model", "GLM-4.5-FP8", "--mesh", "3"], "does not divide"),
        ([], "--plan needs --model"),
        (["--model", "GLM-4.5-FP8", "--mesh", "8", "--page-size", "48"], "page_size 48"),
    ],
)
def test_serve_refuses_what_cannot_be_planned(arguments, message):
    done = planned(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_must_be_known():
    with pytest.raises(ConfigError, match="'b200', expected one of h100, h200"):
        plan("GLM-4.5-Air-FP8", 2, "b200")


@pytest.mark.parametrize("accepted", [0.0, 4.5])
def test_accepted_tokens_must_be_possible(accepted):
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        plan("GLM-4.5-Air-FP8", 2, workload=Workload(accepted_tokens=accepted))
