"""Every test sees eight virtual CPU devices, on any machine."""

import os

# Compiling is most of the suite's time; models are tiny, so slow code costs less than good code.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

from pathlib import Path

import jax
import pytest
from hypothesis import settings

# Through jax.config rather than the environment: programs that tests start choose for themselves.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# How long an example takes says nothing on a shared machine; CI draws the same examples each run.
settings.register_profile("glmjax", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("glmjax")

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A folder's tests run in one process, which compiles what they share once."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(pytest.mark.xdist_group(folder))
