"""The script for the first day with a GPU, on a CPU: every section gives rows, none a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("first_day.py")


def first_day(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def rehearse(folder: Path, *arguments: str) -> dict[str, list[dict]]:
    done = first_day(folder, "--rehearse", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("# REHEARSAL")
    assert done.stdout == (folder / "first_day.md").read_text() + "\n"
    found = json.loads((folder / "first_day.json").read_text())
    assert found["REHEARSAL"] is True
    check_rows(found["sections"])
    return found["sections"]


def check_rows(sections: dict[str, list[dict]]) -> None:
    for name, rows in sections.items():
        assert rows, name
        for row in rows:
            assert row["REHEARSAL"] is True
            assert "error" not in row
            speeds = [key for key in row if key.endswith(("_us", "_s", "_share"))]
            assert [row[key] for key in speeds] == [None] * len(speeds), name


def test_sections_run_in_processes_of_their_own(tmp_path):
    sections = rehearse(tmp_path, "--only", "collectives")
    assert list(sections) == ["machine", "collectives"]
    assert {row["devices"] for row in sections["collectives"]} == {2}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_day(tmp_path):
    sections = rehearse(tmp_path)
    assert len(sections) == 12
    parity = sections["parity"]
    assert not [row for row in parity if row["wrong"]]
    assert {row["backend"] for row in parity} == {"triton", "mosaic"}
    assert len({row["op"] for row in parity}) == 10
    assert len(sections["bandwidth"]) == len(parity)
    assert {row["step"] for row in sections["steps"]} == {"decode", "verify", "prefill"}
    cold, warm = sections["compile"]
    assert cold["cache_hits"] < warm["cache_hits"]


def test_it_refuses_where_there_is_no_gpu(tmp_path):
    done = first_day(tmp_path, "--only", "parity")
    assert done.returncode == 1
    assert "no GPU: JAX found cpu" in done.stderr
    assert "--rehearse" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_section_is_a_wrong_command_line(tmp_path):
    done = first_day(tmp_path, "--only", "parties")
    assert done.returncode == 2
    assert "no section 'parties'" in done.stderr
