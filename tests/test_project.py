"""Installing: what is pinned, and that a clean copy needs two commands and no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"([a-z0-9-]+)==[0-9][0-9a-z.]*")


def constraint_lines() -> list[str]:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def canonical(requirement: str) -> str:
    """The package that a requirement or a pin names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_constraints_are_exact_versions_and_nothing_else():
    lines = constraint_lines()
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert lines == sorted(set(lines))


def test_everything_the_project_asks_for_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    pinned = {canonical(line) for line in constraint_lines()}
    own = {project["name"]}  # one extra may ask for another
    assert {canonical(requirement) for requirement in wanted} - pinned - own == set()
    assert {"torch", "transformers"} <= pinned


def test_serving_and_testing_ask_for_no_torch_and_no_cuda():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert not [name for name in wanted if re.match("torch|transformers|nvidia|.*cuda", name)]


@pytest.mark.slow
def test_a_clean_copy_sets_itself_up(tmp_path):
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    subprocess.run(["make", "setup"], cwd=copy, check=True)
    python = copy / ".venv/bin/python"
    frozen = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze", "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    installed = {line for line in frozen if canonical(line) not in {"pip", "setuptools"}}
    pins = set(constraint_lines())
    assert {line for line in installed if line.replace("_", "-").lower() not in pins} == set()
    names = " ".join(map(canonical, installed))
    assert not re.search("torch|nvidia|cuda", names)
    code = "import glmjax, convert, pallas_kernels; print(glmjax.__file__)"
    where = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert where.stdout.strip() == str(copy / "glmjax/__init__.py")
