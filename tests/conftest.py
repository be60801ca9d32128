"""Every test sees eight virtual CPU devices, on any machine."""

import os

# Compiling is most of the suite's time; models are tiny, so slow code costs less than good code.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

from pathlib import Path

import jax
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Through jax.config rather than the environment: programs that tests start choose for themselves.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# How long an example takes says nothing on a shared machine; CI draws the same examples each run.
settings.register_profile("glmjax", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("glmjax")

APART = ("aot",)  # folders whose tests share nothing, so that processes share them out
LONGEST = ("e2e", "runner", "train")  # folders that go first, so that none of them goes alone


def folder_of(nodeid: str) -> str:
    """The folder of tests/ that a test is in."""
    return Path(nodeid.split("::")[0]).parts[1]


class ByFolder(LoadScopeScheduling):
    """A folder's tests run in one process, which compiles what they share once."""

    def _split_scope(self, nodeid: str) -> str:
        folder = folder_of(nodeid)
        return nodeid if folder in APART else folder


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFolder:
    config.option.loadscopereorder = False
    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: folder_of(item.nodeid) not in LONGEST)
