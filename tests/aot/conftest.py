"""These need the compiler for NVIDIA GPUs, which `make aot` installs: without it, no tests here."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("cramjam") else ["test_*.py"]
