"""The house rules of docs/architecture.md: who may import whom, and a few more."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

import glmjax

ROOT = Path(__file__).parents[1]
BASE = {"errors", "config", "types", "plans"}

# Room -> the rooms it may import besides itself. A room is a folder of glmjax/, a file in it, or a
# folder or file beside it; "glmjax" is glmjax/__init__.py.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors", "pallas_kernels"},  # of those only the name of a backend: no jax
    "releases": {"errors", "config"},
    "types": {"errors"},
    "plans": {"types"},
    "checkpoint": {"errors", "config"},
    "tables": set(),
    # host
    "scheduler": BASE,
    "text": BASE,
    "engine": BASE | {"scheduler"},
    "server": BASE | {"engine", "text"},
    "bench": BASE
    | {"build", "bundled", "devices", "engine", "runner", "scheduler", "server", "text", "train"}
    | {"tables"},
    # device
    "pallas_kernels": set(),
    "sharding": {"errors", "config"},
    "devices": {"errors", "config", "sharding", "pallas_kernels"},
    "model": {"errors", "config", "sharding", "pallas_kernels"},
    "runner": BASE | {"checkpoint", "sharding", "model", "pallas_kernels"},
    # several hosts
    "hosts": BASE | {"checkpoint", "runner"},
    # where both meet
    "build": BASE | {"checkpoint", "devices", "engine", "planner", "runner", "scheduler", "server"},
    "bundled": BASE | {"checkpoint", "convert", "devices"},
    "llm": BASE | {"build", "bundled", "engine", "scheduler", "server", "text"},
    "glmjax": BASE | {"engine", "llm", "planner", "text"},
    "train": BASE
    | {"bench", "checkpoint", "devices", "model", "pallas_kernels", "runner", "sharding", "text"}
    | {"bundled", "convert", "llm", "tables"},
    # with no GPU
    "aot": BASE
    | {
        "checkpoint",
        "convert",
        "model",
        "pallas_kernels",
        "releases",
        "runner",
        "scheduler",
        "sharding",
        "tables",
    },
    "planner": BASE
    | {
        "aot",
        "checkpoint",
        "model",
        "pallas_kernels",
        "releases",
        "runner",
        "scheduler",
        "sharding",
        "tables",
    },
    # command lines
    "convert": BASE | {"checkpoint", "model", "sharding"},
    "serve": BASE | {"build", "bundled", "devices", "hosts", "planner", "server"},
}
WITHOUT_JAX = BASE | {"checkpoint", "releases", "tables", "scheduler", "text", "engine", "server"}
FILES_WITHOUT_JAX = {
    "glmjax/runner/fake.py",
    "glmjax/bench/__init__.py",
    "glmjax/bench/synthetic.py",
}
JAX = {"jax", "jaxlib", "flax", "orbax", "optax"}
NEVER = {"torch", "transformers"}

MESH_AXES = {"data", "tensor"}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
MAX_LINES = 500

Fault = tuple[int, str]


def product_files(root: Path) -> list[Path]:
    """The product's Python files, relative to the root."""
    found = chain(
        *(root.glob(f"{room}/**/*.py") for room in ("glmjax", "pallas_kernels", "convert")),
        root.glob("serve.py"),
    )
    return sorted(file.relative_to(root) for file in found)


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a dotted name: ("glmjax", "model", "moe") -> "model"."""
    top, *inner = parts
    return inner[0] if top == "glmjax" and inner and inner[0] != "__init__" else top


def imports(file: Path, tree: ast.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted name of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: -node.level] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((node.lineno, (*package, *module, alias.name)) for alias in node.names)


def check_rooms(file: Path, tree: ast.Module) -> Iterator[Fault]:
    room = room_of(file.with_suffix("").parts)
    if room not in MAY_IMPORT:
        yield 1, f"room {room} is new: give it a row in MAY_IMPORT and in docs/architecture.md"
        return
    for line, name in imports(file, tree):
        other = room_of(name)
        if name[0] == "glmjax" and other not in MAY_IMPORT:
            other = "glmjax"  # a name that glmjax/__init__.py exports
        if other in MAY_IMPORT.keys() - MAY_IMPORT[room] - {room}:
            allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing of the house"
            yield line, f"{room} may not import {'.'.join(name)}; it may import: {allowed}"


def check_jax(file: Path, tree: ast.Module) -> Iterator[Fault]:
    host = room_of(file.with_suffix("").parts) in WITHOUT_JAX or str(file) in FILES_WITHOUT_JAX
    banned = NEVER | JAX if host else NEVER
    for line, name in imports(file, tree):
        if name[0] in banned:
            why = "host rooms work without jax" if name[0] in JAX else "the product works without"
            yield line, f"{file} may not import {name[0]}: {why}"


def check_axes(file: Path, tree: ast.Module) -> Iterator[Fault]:
    if room_of(file.with_suffix("").parts) in WITHOUT_JAX | {"sharding"}:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            yield node.lineno, f'only glmjax/sharding.py names mesh axes, not "{node.value}"'


def check_name(file: Path, tree: ast.Module) -> Iterator[Fault]:
    for part in EMPTY_NAMES.intersection(file.stem.split("_")):
        yield 1, f'a file named "{part}" says nothing about what is in it'


RULES = (check_rooms, check_jax, check_axes, check_name)


def violations(root: Path) -> list[str]:
    """Every broken rule as "file:line: what"."""
    found = []
    for file in product_files(root):
        text = (root / file).read_text("utf-8")
        tree = ast.parse(text)
        faults = chain(*(rule(file, tree) for rule in RULES), check_length(text))
        found += [f"{file}:{line}: {fault}" for line, fault in faults]
    return found


def check_length(text: str) -> Iterator[Fault]:
    lines = text.count("\n")
    if lines > MAX_LINES:
        yield lines, f"{lines} lines, at most {MAX_LINES}"


def modules_without_jax(root: Path) -> list[str]:
    """Dotted names of what must import on a machine that has no jax."""
    files = [
        file
        for file in product_files(root)
        if room_of(file.with_suffix("").parts) in WITHOUT_JAX or str(file) in FILES_WITHOUT_JAX
    ]
    return [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]


def import_with_jax_blocked(modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Really import `modules` in a process where importing jax fails."""
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(JAX | NEVER)!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


# The product


def test_the_house_keeps_its_rules():
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_test_files_are_short_too():
    found = [
        f"{file.relative_to(ROOT)}: {fault}"
        for file in ROOT.glob("tests/**/*.py")
        for _, fault in check_length(file.read_text("utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def test_host_rooms_import_on_a_machine_without_jax():
    modules = modules_without_jax(ROOT)
    assert {"glmjax.types", "glmjax.config", "glmjax.scheduler.scheduler"} <= set(modules)
    result = import_with_jax_blocked(modules)
    assert result.returncode == 0, result.stderr


def test_every_row_of_the_table_is_a_room():
    rooms = {room_of(file.with_suffix("").parts) for file in product_files(ROOT)}
    assert rooms == MAY_IMPORT.keys()


def test_exported_names_exist_and_are_no_modules():
    values = {name: getattr(glmjax, name) for name in glmjax.__all__}
    assert not [name for name, value in values.items() if isinstance(value, ModuleType)]
    # or else what a name means would depend on what was imported before
    assert not [name for name in values if (ROOT / "glmjax" / f"{name}.py").exists()]


# The checker itself


def test_blocking_jax_works():
    result = import_with_jax_blocked(["glmjax.sharding"])
    assert result.returncode != 0
    assert "jax" in result.stderr


VIOLATIONS = [
    (
        "glmjax/scheduler/pages.py",
        "import os\nimport jax\n",
        "2: glmjax/scheduler/pages.py may not",
    ),
    ("glmjax/text/a.py", "def f():\n    import jax.numpy as jnp\n", "2: glmjax/text/a.py may not"),
    ("glmjax/runner/fake.py", "from jax import Array\n", "1: glmjax/runner/fake.py may not import"),
    ("glmjax/model/moe.py", "\nfrom glmjax.runner.steps import x\n", "2: model may not import"),
    ("glmjax/model/moe.py", "from glmjax import runner\n", "1: model may not import glmjax.runner"),
    (
        "glmjax/model/moe.py",
        "from ..runner import steps\n",
        "1: model may not import glmjax.runner",
    ),
    ("glmjax/model/moe.py", "import glmjax.engine\n", "1: model may not import glmjax.engine"),
    ("glmjax/model/moe.py", "from glmjax import Engine\n", "1: model may not import glmjax.Engine"),
    ("glmjax/server/a.py", "from glmjax.runner.fake import x\n", "1: server may not import"),
    ("glmjax/runner/a.py", "import torch\n", "1: glmjax/runner/a.py may not import torch"),
    ("pallas_kernels/a.py", "from glmjax.types import x\n", "it may import: nothing of the house"),
    ("glmjax/config.py", "import convert.mapping\n", "1: config may not import convert.mapping"),
    ("serve.py", "from glmjax.runner import x\n", "1: serve may not import glmjax.runner.x"),
    ("glmjax/attic/a.py", "", "1: room attic is new"),
    ("glmjax/model/a.py", 'x = 1\ny = P("tensor")\n', "2: only glmjax/sharding.py names mesh axes"),
    ("convert/a.py", 'mesh.shape["data"]\n', '1: only glmjax/sharding.py names mesh axes, not "da'),
    ("glmjax/text/chat_utils.py", "", '1: a file named "utils" says nothing'),
    ("glmjax/types.py", "x = 1\n" * 501, "501: 501 lines, at most 500"),
]


@pytest.mark.parametrize(("file", "source", "message"), VIOLATIONS)
def test_the_checker_catches(tmp_path, file, source, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert message in found[0]


ALLOWED = [
    ("glmjax/model/moe.py", "import jax\nfrom glmjax.sharding import TENSOR\n"),
    ("glmjax/model/moe.py", "from . import layers\nfrom pallas_kernels.router import route\n"),
    ("glmjax/server/a.py", 'reply = {"object": "list", "data": []}\n'),
    ("glmjax/sharding.py", 'DATA, TENSOR = "data", "tensor"\n'),
    ("glmjax/types.py", "x = 1\n" * 500),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_the_checker_lets_pass(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path) == []
