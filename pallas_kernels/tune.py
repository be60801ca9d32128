"""Find the fastest tiles on this machine's GPU. See `python -m pallas_kernels.tune --help`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from tempfile import NamedTemporaryFile
from typing import Any

import jax
from tqdm import tqdm

from pallas_kernels import tiles
from pallas_kernels.backend import DEVICES, NAMES, Backend
from pallas_kernels.measure import LEAST_S, ROUNDS, Program
from pallas_kernels.tile_candidates import Part, Task, attention_tasks, grouped_tasks
from pallas_kernels.tiles import Tile

TASKS = {"grouped_matmul": grouped_tasks, "paged_attention": attention_tasks}
MAX_COMPILERS = 8

Entry = dict[str, Any]
Table = dict[str, dict[str, list[Entry]]]

EPILOG = """\
Each candidate is compiled, compared with the oracle once, and timed; the fastest of those that are
right goes to the file, after each shape, so a stop loses nothing. A product's two halves are
tuned together, because their rows lie in the same blocks. Entries of other devices, operations and
shapes stay. Let the GPU be idle: another process on it makes the figures worthless.

examples:
  python -m pallas_kernels.tune                            everything: many hours
  python -m pallas_kernels.tune --cases '355b tp8 float8'  one deployment: minutes to an hour
  python -m pallas_kernels.tune --op paged_attention --out /tmp/tiles.json
  python -m pallas_kernels.tune --list                     what there is, and how many candidates
"""


@dataclass(frozen=True)
class Settings:
    """How candidates are timed: see `pallas_kernels.measure`."""

    copies: int | None = None
    rounds: int = ROUNDS
    least_s: float = LEAST_S


# What is measured


def measure(task: Task, backend: Backend, settings: Settings) -> list[dict[int, float]]:
    """Score of each part's candidates, by place; those that fail or are wrong are left out."""
    return [_measure_part(task, part, backend, settings) for part in task.parts]


def _measure_part(task: Task, part: Part, backend: Backend, settings: Settings) -> dict[int, float]:
    """The geometric mean of a candidate's seconds for all cases."""
    scores: dict[int, float] = {}
    with offered(task.op, part, backend) as backends:
        for i, compiled in enumerate(_compile(part, backends, settings)):
            try:
                scores[i] = geometric_mean([_timed(p, settings) for p in compiled()])
            except Exception as error:  # a compiler's, a launch's: any fault of a tile drops it
                reason = str(error).strip().partition("\n")[0][:160]
                tqdm.write(f"dropped {_words(part.tiles[i])}: {type(error).__name__}: {reason}")
    return scores


def _compile(
    part: Part, backends: Sequence[Backend], settings: Settings
) -> list[Callable[[], list[Program]]]:
    """Programs of each candidate, or what its compilation raised; all done before any is timed."""

    def programs(backend: Backend) -> list[Program]:
        return [Program(case, backend, settings.copies) for case in part.cases(backend)]

    with ThreadPoolExecutor(MAX_COMPILERS) as pool:
        running = [pool.submit(programs, backend) for backend in backends]
        bar = {"desc": "  compiling", "unit": "tile", "disable": None, "leave": False}
        for _ in tqdm(as_completed(running), total=len(running), **bar):
            pass
    return [future.result for future in running]


@contextmanager
def offered(op: str, part: Part, backend: Backend) -> Iterator[list[Backend]]:
    """A backend for each candidate: a device in the table which has that tile alone.

    So a tile is tried the way it will be used: found in the table, and refused where it does not
    suit a kernel.
    """
    table = tiles.table()
    names = [f"{backend.device}, candidate {i}" for i in range(len(part.tiles))]
    for name, tile in zip(names, part.tiles, strict=True):
        table[name] = {op: [{"when": part.when, "tile": tile}]}
    try:
        yield [replace(backend, device=name) for name in names]
    finally:
        for name in names:
            del table[name]


def _timed(program: Program, settings: Settings) -> float:
    copies = program.inputs()
    found = program.check(copies)
    if found.wrong:
        raise ValueError(f"wrong by {found.roundings:.1f} roundings, {found.rms:.2%} RMS")
    return program.seconds(copies, settings.rounds, settings.least_s)


# What is chosen


def choose(task: Task, scores: Sequence[Mapping[int, float]]) -> list[tuple[Tile, float]] | None:
    """The tiles of all parts with the least sum of scores that are alike where they must be.

    None where some part has no candidate left.
    """
    groups: dict[tuple[Any, ...], list[tuple[Tile, float]]] = {}
    for part, found in zip(task.parts, scores, strict=True):
        for key, best in _best_by(part, found, task.alike).items():
            groups.setdefault(key, []).append(best)
    whole = [group for group in groups.values() if len(group) == len(task.parts)]
    return min(whole, key=lambda group: sum(score for _, score in group), default=None)


def _best_by(
    part: Part, scores: Mapping[int, float], names: Sequence[str]
) -> dict[tuple[Any, ...], tuple[Tile, float]]:
    """The fastest candidate for each choice of what must be alike."""
    best: dict[tuple[Any, ...], tuple[Tile, float]] = {}
    for i, score in scores.items():
        key = tuple(part.tiles[i][name] for name in names)
        if key not in best or score < best[key][1]:
            best[key] = part.tiles[i], score
    return best


# What is written


def merge(table: Table, device: str, op: str, found: Sequence[Entry]) -> Table:
    """The table with new entries; those they take the place of are those of the same names.

    A device that has no entries yet begins with what it has used so far, those of the default.
    """
    entries = dict(table.get(device, table.get(tiles.DEFAULT_DEVICE, {})))
    kept = [old for old in entries.get(op, []) if not any(_replaces(new, old) for new in found)]
    return table | {device: entries | {op: sorted([*kept, *found], key=_order)}}


def _replaces(new: Entry, old: Entry) -> bool:
    """Whether both speak of the same names, and the new one of all shapes of the old."""
    mine, theirs = new["when"], old["when"]
    return mine.keys() == theirs.keys() and all(_covers(mine[n], theirs[n]) for n in mine)


def _covers(one: Any, other: Any) -> bool:
    (a, b), (c, d) = (x if isinstance(x, list) else (x, x) for x in (one, other))
    return a <= c and d <= b if type(a) is type(c) else False


def _order(entry: Entry) -> tuple[Any, ...]:
    """The first entry that holds is taken: more conditions come first, then narrower ranges."""
    when = entry["when"]
    width = sum(value[1] - value[0] for value in when.values() if isinstance(value, list))
    named = sorted(when.items(), key=lambda item: (isinstance(item[1], list), item[0]))
    return -len(when), width, [(n, *(_sortable(x) for x in _as_list(v))) for n, v in named]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sortable(value: Any) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, str(value))


def text(table: Table) -> str:
    """JSON with an entry a line, the same for the same table."""
    devices = (f"{json.dumps(name)}: {_ops_text(ops)}" for name, ops in sorted(table.items()))
    return "{" + ",\n".join(devices) + "}\n"


def _ops_text(ops: Mapping[str, Sequence[Entry]]) -> str:
    lists = []
    for op, entries in sorted(ops.items()):
        lines = ",".join(f"\n    {json.dumps(entry)}" for entry in entries)
        lists.append(f"\n  {json.dumps(op)}: [{lines}]")
    return "{" + ",".join(lists) + "}"


def write(file: Path, device: str, op: str, found: Sequence[Entry]) -> None:
    """Merge entries into a file, or into those that come with glmjax: whole, or not at all."""
    source = file if file.exists() else tiles.FILE
    table = merge(json.loads(source.read_text("utf-8")), device, op, found)
    with NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        new.write(text(table))
    os.chmod(new.name, 0o644)
    os.replace(new.name, file)


# All of it


def tune(
    tasks: Sequence[Task], backend: Backend, out: Path, settings: Settings = Settings()
) -> list[dict[str, Any]]:
    """Measure, choose and write, one task after another; what was chosen, and its seconds."""
    rows = []
    for task in tqdm(tasks, "tuning", unit="shape", disable=None):
        found = choose(task, measure(task, backend, settings))
        if found is None:
            tqdm.write(f"{task.op}, {task.label}: no candidate works; the table stays")
            continue
        pairs = list(zip(task.parts, found, strict=True))
        write(out, backend.device, task.op, [entry(part, tile) for part, (tile, _) in pairs])
        for part, (tile, score) in pairs:
            tqdm.write(f"{task.op}, {task.label}: {_words(tile)}")
            row = {"op": task.op, "label": task.label, "when": part.when, "tile": dict(tile)}
            rows.append(row | {"tile_us": 1e6 * score})
    return rows


def entry(part: Part, tile: Tile) -> Entry:
    """What tiles.json says of a part."""
    return {"when": part.when, "tile": dict(tile)}


def select(backend: Backend, ops: Sequence[str], pattern: str = "", **shapes: Any) -> list[Task]:
    """Tasks whose operation and label a regular expression is found in."""
    tasks = (task for op in ops for task in TASKS[op](backend, **shapes))
    return [task for task in tasks if re.search(pattern, f"{task.op}, {task.label}")]


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description="Find the fastest tiles of the kernels on this machine's GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", help=f"key of the file; default: the GPU's, {' or '.join(DEVICES)}")
    p.add_argument("--op", choices=TASKS, help="default: all")
    p.add_argument("--cases", default="", metavar="REGEX", help="shapes, as --list shows them")
    p.add_argument("--backend", choices=NAMES[1:], default="mosaic", help="default: mosaic")
    p.add_argument(
        "--out", type=Path, default=tiles.FILE, help="default: pallas_kernels/tiles.json"
    )
    p.add_argument("--list", action="store_true", help="only show the shapes; needs no GPU")
    return p


def gpu() -> str:
    """The GPU's name. Raises RuntimeError where JAX has none."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise RuntimeError(
            f"no GPU: JAX found {device.platform} ({device.device_kind}). Tiles can only be timed"
            " on the GPU that will use them. On a machine where nvidia-smi lists one, install"
            " JAX's CUDA libraries (pip install -e '.[cuda12]') and unset JAX_PLATFORMS"
        )
    return device.device_kind


def known_device(name: str) -> str:
    """The key in tiles.json of a GPU. Raises RuntimeError for one that has none."""
    found = next((known for known in DEVICES if known in name.lower()), None)
    if found is None:
        raise RuntimeError(f"{name} is neither of {', '.join(DEVICES)}: name its key by --device")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all was tuned, 1 when there is nothing to tune or on."""
    p = parser()
    args = p.parse_args(arguments)
    ops = [args.op] if args.op else list(TASKS)
    backend = Backend(args.backend)
    try:
        tasks = select(backend, ops, args.cases)
    except re.error as error:
        p.error(f"--cases {args.cases!r} is no regular expression: {error}")
    if args.list:
        print("\n".join(map(describe, tasks)))
        return 0
    try:
        backend = replace(backend, device=args.device or known_device(gpu()))
        gpu()
    except RuntimeError as error:
        print(f"pallas_kernels.tune: {error}", file=sys.stderr)
        return 1
    if not tasks:
        print(f"pallas_kernels.tune: no shape matches {args.cases!r}; see --list", file=sys.stderr)
        return 1
    return 0 if tune(tasks, backend, args.out) else 1


def describe(task: Task) -> str:
    """A line of --list."""
    count = sum(len(part.tiles) for part in task.parts)
    return f"{task.op}, {task.label}: {count} candidates"


if __name__ == "__main__":
    sys.exit(main())
