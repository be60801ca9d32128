"""Every test sees eight virtual CPU devices, on any machine."""

import os

# Compiling is most of the suite's time; models are tiny, so slow code costs less than good code.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
from hypothesis import settings

# Through jax.config rather than the environment: programs that tests start choose for themselves.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# How long an example takes says nothing on a shared machine; CI draws the same examples each run.
settings.register_profile("glmjax", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("glmjax")
