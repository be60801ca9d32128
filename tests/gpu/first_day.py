"""The first day with a GPU: measures in one go what cannot be known without one.

    python tests/gpu/first_day.py                       all of it, one to two hours on an H100
    python tests/gpu/first_day.py --only parity,graphs  some sections
    python tests/gpu/first_day.py --tune '355b tp8 float8'
    python tests/gpu/first_day.py --rehearse            on a CPU: does this script work?

Let nothing else use the GPUs. Each section runs in a process of its own, so that one which fails,
hangs or breaks its CUDA context is a result and not the end. Its rows are kept as they come, in a
JSON file, with a summary in markdown beside it.

What to do with the results: a row of `parity` that is wrong is a bug in that kernel: serve with
`--kernels` of another backend until it is mended. `tiles` writes tiles.json: commit it. Where a
setting of `graphs` is clearly faster, and survives an hour of traffic, it belongs into the options
that steps are compiled with (glmjax/runner/compiled.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

from tqdm import tqdm

from glmjax.tables import Table, show

Row = dict[str, Any]
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
GRAPH_SETTINGS = ("default", "off", "kernels", "collectives")


@dataclass(frozen=True)
class Section:
    """What is measured.

    Attributes:
        about: what it tells.
        module, function: its code, Day -> rows; imported where it runs, since it starts JAX.
        minutes: after which it counts as hanging.
        extra: more arguments of the function.
    """

    about: str
    module: str
    function: str
    minutes: float = 30
    extra: tuple[Any, ...] = ()

    def rows(self, day: Any) -> Iterator[Row]:
        """Measure, here and now."""
        room = __import__(self.module)
        return getattr(room, self.function)(day, *self.extra)


SECTIONS = {
    "machine": Section("devices and versions", "day", "machine", 5),
    "parity": Section("kernels against their oracles", "kernel_day", "parity", 90),
    "bandwidth": Section("kernels against the roofline", "kernel_day", "bandwidth", 90),
    "tiles": Section("the tuner, for what --tune names", "kernel_day", "tuned", 600),
    "steps": Section("whole steps against the roofline", "step_day", "steps"),
    "dispatch": Section("host time of a launch", "step_day", "dispatch"),
    **{
        f"graphs-{name}": Section(
            f"steps with CUDA graphs: {name}", "step_day", "graphs", 30, (name,)
        )
        for name in GRAPH_SETTINGS
    },
    "collectives": Section("sums over GPUs", "collective_day", "collectives"),
    "compile": Section("cold and warm compilation", "step_day", "compiling"),
}


def measure(name: str, args: argparse.Namespace, file: Path) -> None:
    """In the section's own process: append its rows to a file, and the error that ends it."""
    import day as days

    today = days.Day(args.rehearse, args.all, tuple(args.model), args.tune)
    if args.rehearse:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", days.REHEARSAL_DEVICES)
    with file.open("a", encoding="utf-8") as out:
        rows = SECTIONS[name].rows(today)
        while (row := next_row(rows)) is not None:
            kept = today.kept(row)
            out.write(json.dumps(kept, default=str) + "\n")
            out.flush()
            print(f"  {line(kept)}", file=sys.stderr)


def line(row: Row) -> str:
    """A row for the eye."""
    return ", ".join(f"{key} {show(x)}" for key, x in row.items() if x is not None)[:300]


def next_row(rows: Iterator[Row]) -> Row | None:
    """The next one; what was raised instead, as a row; None at the end."""
    try:
        return next(rows, None)
    except Exception as error:  # is the result
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def run(name: str, arguments: Sequence[str], minutes: float, folder: Path) -> list[Row]:
    """A section in a process of its own; its rows, and how it ended where that was not well."""
    file = folder / f"{name}.jsonl"
    file.touch()
    command = [sys.executable, __file__, "--section", name, "--rows", str(file), *arguments]
    began, ending = time.monotonic(), []
    with subprocess.Popen(command, cwd=folder, **PIPES) as process:
        stop = Timer(60 * minutes, process.kill)
        stop.start()
        said = echoed(process)
        stop.cancel()
    if time.monotonic() - began > 60 * minutes:
        ending = [{"error": f"hung: stopped after {minutes:g} minutes"}]
    elif process.returncode:
        ending = [{"error": f"ended with status {process.returncode}: {said}"}]
    return [json.loads(text) for text in file.read_text("utf-8").splitlines()] + ending


def echoed(process: subprocess.Popen[bytes]) -> str:
    """Pass on what a process says until it ends; the end of that."""
    assert process.stdout is not None
    tail = ""
    for said in process.stdout:
        text = said.decode(errors="replace")
        sys.stderr.write(text)
        tail = (tail + text)[-2000:]
    return tail


def failures(results: dict[str, list[Row]]) -> list[str]:
    """Rows that have an error or are wrong, in words."""
    return [
        f"{name}: {json.dumps(row)}"
        for name, rows in results.items()
        for row in rows
        if "error" in row or row.get("wrong")
    ]


def summary(results: dict[str, list[Row]], rehearse: bool) -> str:
    """Markdown: a table a section, and what failed."""
    title = "# REHEARSAL on a CPU: no speeds" if rehearse else "# The first day with a GPU"
    parts = [title, f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}"]
    for name, rows in results.items():
        columns = tuple(dict.fromkeys(key for row in rows for key in row))
        table = [tuple(_shown(row.get(key)) for key in columns) for row in rows]
        heading = f"{'REHEARSAL: ' if rehearse else ''}{name}"
        about = SECTIONS[name].about
        parts.append(Table(heading, columns, table, about).text() if rows else f"### {heading}")
    failed = failures(results)
    parts.append(f"### Failures: {len(failed)}\n\n" + "\n".join(f"- {line}" for line in failed))
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> Any:
    if isinstance(value, bool | dict | list):
        return json.dumps(value)
    return value.replace("\n", " ").replace("|", "/")[:120] if isinstance(value, str) else value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (f"  {name:20}{section.about}" for name, section in SECTIONS.items())
    p = argparse.ArgumentParser(
        prog="tests/gpu/first_day.py",
        description=__doc__,
        epilog="sections:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, default=Path("first_day.json"), help="default: %(default)s")
    p.add_argument("--only", metavar="NAMES", help="sections, by the beginnings of their names")
    p.add_argument("--all", action="store_true", help="all official shapes, not the usual splits")
    p.add_argument("--tune", metavar="REGEX", help="tune these shapes: see pallas_kernels.tune")
    p.add_argument(
        "--model",
        action="append",
        default=[],
        help="a converted folder, glm-nano, or an official release with a few layers of noise;"
        " more than once for several; default: glm-nano, and Air in BF16 and FP8",
    )
    p.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU; no speeds")
    p.add_argument("--section", help=argparse.SUPPRESS)
    p.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return p


def chosen(only: str | None) -> list[str]:
    """Names of sections; the machine's is always there. ValueError for one that is none."""
    wanted = only.split(",") if only else [""]
    for name in wanted:
        if not any(section.startswith(name) for section in SECTIONS):
            raise ValueError(f"no section {name!r}; there are {', '.join(SECTIONS)}")
    return [s for s in SECTIONS if s == "machine" or s.startswith(tuple(wanted))]


def forwarded(args: argparse.Namespace) -> list[str]:
    """The arguments that sections need."""
    flags = [f"--{name}" for name in ("all", "rehearse") if getattr(args, name)]
    tune = ["--tune", args.tune] if args.tune is not None else []
    given = [Path(name) for name in args.model]
    models = [str(m.resolve()) if m.exists() else str(m) for m in given]
    return [*flags, *tune, *(f"--model={name}" for name in models)]


def measure_all(names: Sequence[str], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Rows of each section, kept in --out from one to the next; no more where there is no GPU."""
    results: dict[str, list[Row]] = {}
    with TemporaryDirectory() as folder:
        for name in tqdm(names, "sections", disable=None):
            tqdm.write(f"{'REHEARSAL: ' if args.rehearse else ''}{name}", file=sys.stderr)
            minutes = SECTIONS[name].minutes
            results[name] = run(name, forwarded(args), minutes, Path(folder))
            if name == "machine" and failures(results):
                break
            whole = {"REHEARSAL": True} if args.rehearse else {}
            args.out.write_text(json.dumps(whole | {"sections": results}, indent=1) + "\n", "utf-8")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all went well, 1 when something failed, 2 for a wrong command line."""
    p = parser()
    args = p.parse_args(arguments)
    if args.section:
        measure(args.section, args, args.rows)
        return 0
    try:
        names = chosen(args.only)
    except ValueError as error:
        p.error(str(error))
    results = measure_all(names, args)
    if "machine" in results and failures({"machine": results["machine"]}):
        print(results["machine"][-1]["error"], file=sys.stderr)
        return 1
    text = summary(results, args.rehearse)
    args.out.with_suffix(".md").write_text(text, "utf-8")
    print(text)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
