"""The processes of tests/processes.py."""

from processes import environment, run_command

__all__ = ["environment", "run_command"]
