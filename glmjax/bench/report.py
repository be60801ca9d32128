"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("glmjax", "jax", "jaxlib", "numpy")
CPU_INFO, CPU_NAME = Path("/proc/cpuinfo"), "model name"


def machine() -> dict[str, str]:
    """Where and with what the figures come from, by name."""
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "CPU": f"{_cpu()}, {_cores()} cores",
        "memory": f"{_memory_bytes() / 2**30:.0f} GiB",
        "load average": load_average(),
        "versions": ", ".join(_versions()),
    }


def load_average() -> str:
    """Processes that wanted to run in the last 1, 5 and 15 minutes."""
    return ", ".join(f"{load:.2f}" for load in os.getloadavg())


def _cpu() -> str:
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(CPU_NAME))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}"
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} from its source"
