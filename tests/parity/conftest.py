"""The processes of tests/processes.py; without torch nothing here is collected."""

from __future__ import annotations

import importlib.util

from processes import environment, run_command, start_server

__all__ = ["environment", "run_command", "start_server"]

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    collect_ignore_glob = ["*"]
