"""GPUs are described as asked for, or refused with words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glmjax.aot import target
from glmjax.aot.target import assembler_first, described_mesh
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("device", "name"), [("h100", "H100 80GB"), ("h200", "H200")])
def test_a_device_is_what_it_is_called(device, name):
    mesh = described_mesh(device, MeshConfig(1, 4))
    assert mesh.devices.shape == (1, 4)
    assert {d.platform for d in mesh.devices.flat} == {"gpu"}
    assert all(name in d.device_kind for d in mesh.devices.flat)


def test_data_groups_lie_on_hosts_of_their_own():
    mesh = described_mesh("h100", MeshConfig(2, 8, hosts=2))
    hosts = [[device.process_index for device in row] for row in mesh.devices]
    assert hosts == [[0] * 8, [1] * 8]


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="'a100', expected one of h100, h200"):
        described_mesh("a100", MeshConfig(1, 1))


def test_the_packages_assembler_comes_first_once(monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join(["/somewhere", "/usr/bin"]))
    assembler_first()
    assembler_first()
    first, *others = os.environ["PATH"].split(os.pathsep)
    assert os.access(f"{first}/ptxas", os.X_OK)
    assert others == ["/somewhere", "/usr/bin"]


@pytest.mark.parametrize(
    "package", ["no_such", "no_such.inner", "nvidia.no_such", "nvidia.cuda_nvcc"]
)
def test_what_is_not_installed_is_said_with_a_remedy(package):
    with pytest.raises(ConfigError, match=r"odd is not installed: pip install 'glmjax\[aot\]'"):
        target.tool(package, "bin/odd")


def test_without_the_plugin_it_says_what_to_install():
    code = (
        "import sys, jax\n"
        "sys.modules['jax_plugins.xla_cuda12'] = None\n"  # as if it were not there
        "from glmjax.config import MeshConfig\n"
        "from glmjax.aot.target import described_mesh\n"
        "described_mesh('h100', MeshConfig(1, 1))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ConfigError: JAX has no CUDA plugin" in result.stderr
    assert "pip install 'glmjax[plan]'" in result.stderr
