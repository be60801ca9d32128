"""Converts an HF safetensors checkpoint of the GLM-4.5 family for serving with glmjax.

    python convert/hf_to_orbax.py IN OUT

streams the tensors layer by layer, in the memory of one layer, so a laptop converts what needs a
node to serve. Interrupted (Ctrl-C, kill, a full disk) it leaves OUT.partial, never a broken OUT:
the same command goes on where it stopped. Missing, unused and mis-shaped tensors are all reported
before anything is written. FP8 checkpoints stay FP8 unless --dtype is given; --quantize fp8 makes
one of a BF16 checkpoint, as the official FP8 releases are made: linear layers of attention and MLPs
in E4M3 with a scale for each output channel; embeddings, lm_head, norms and routers as they are.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax

from convert.hf_reader import open_source
from convert.orbax_writer import write_group
from convert.partial import (
    check_space,
    check_target,
    copy_files,
    disk_errors,
    done_groups,
    fingerprint,
    finish,
    open_partial,
    recorded_choice,
)
from convert.plan import Plan, make_plan
from convert.progress import Progress, shown, silent
from convert.verify import Verified
from convert.verify import verify as verify_plan
from glmjax.checkpoint import (
    MANIFEST,
    PARAMS,
    Manifest,
    open_converted,
    partial_path,
)
from glmjax.errors import GlmjaxError

logger = logging.getLogger("convert.hf_to_orbax")

DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
}
QUANTIZE = ("fp8",)
INTERRUPTED = 130
EXAMPLES = """examples:
  python convert/hf_to_orbax.py GLM-4.5-Air glm-4.5-air            as it is, BF16 or FP8
  python convert/hf_to_orbax.py GLM-4.5-Air glm-4.5-air --verify   and compare every tensor
  python convert/hf_to_orbax.py GLM-4.5-Air-FP8 air --dtype bf16   dequantised
  python convert/hf_to_orbax.py GLM-4.5-Air air --quantize fp8     BF16 to FP8: half the size
"""


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Convert the HF checkpoint `source` into the new folder `target`.

    Args:
        dtype: "bfloat16" or "float32": cast, and dequantise FP8. None: keep what is stored.
            `e_score_correction_bias` stays float32 always.
        quantize: "fp8": quantise the linear layers that the official FP8 releases do.
        overwrite: replace an older conversion, once the new one is whole.

    Raises:
        CheckpointError: the source is damaged, does not fit its config or, with `quantize`, is FP8
            already; `target` is in the way; or the disk is full.
        ConfigError: config.json is not that of a model glmjax serves.
    """
    target = Path(target).absolute()
    checkpoint = open_source(source)
    plan = make_plan(checkpoint, dtype, quantize)
    check_target(target, overwrite)
    for note in plan.notes:
        logger.warning("%s", note)
    with (
        disk_errors(partial_path(target), _group_bytes(plan)),
        open_partial(target, fingerprint(checkpoint, plan.manifest, quantize)) as (folder, note),
    ):
        if note:
            logger.info("%s", note)
        if "tokenizer.json" not in copy_files(checkpoint.folder, folder):
            logger.warning("%s has no tokenizer.json: text cannot be served", source)
        _write_groups(plan, folder, progress)
        finish(folder, target, plan.manifest)
    return plan.manifest


def verify(source: str | Path, target: str | Path, *, progress: Progress = silent) -> Verified:
    """Reread the converted folder `target` and compare every tensor with `source`, bit for bit.

    What `target` has quantised is compared with what quantising `source` gives.

    Raises:
        CheckpointError: tensors differ (all of them named), or either cannot be read.
    """
    converted = open_converted(Path(target).absolute())
    quantize = recorded_choice(converted.folder)
    stored_fp8 = converted.manifest.quantized and not quantize
    dtype = None if stored_fp8 else converted.manifest.dtype
    plan = make_plan(open_source(source), dtype, quantize)
    with progress("verifying", sum(_group_bytes(plan).values())) as advance:
        return verify_plan(plan, converted, advance)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    _log_to_stderr()
    jax.config.update("jax_platforms", "cpu")  # leave GPUs to those who need them
    previous = signal.signal(signal.SIGINT, _interrupted)
    try:
        _run(args)
    except (GlmjaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


def _interrupted(signum: int, frame: Any) -> NoReturn:
    """Stop at once. Nothing needs tidying: a killed conversion is resumable at any moment.

    An exception instead would surface anywhere, in Orbax's event loop too, which loses it.
    """
    os.write(2, b"\ninterrupted: the same command goes on where it stopped\n")
    os._exit(INTERRUPTED)


def _run(args: argparse.Namespace) -> None:
    finished = (args.target / MANIFEST).exists()
    if args.overwrite or not (args.verify and finished):
        _report(args.target, _convert(args))
    if args.verify:
        verified = verify(args.source, args.target, progress=shown)
        quantised = ", quantised" if recorded_choice(args.target) else ""
        print(
            f"{args.target}: {verified.tensors} tensors, {verified.size_bytes:,} bytes, all equal "
            f"to those of {args.source}{quantised}"
        )


def _convert(args: argparse.Namespace) -> Manifest:
    return convert(
        args.source,
        args.target,
        DTYPES[args.dtype] if args.dtype else None,
        quantize=args.quantize,
        overwrite=args.overwrite,
        progress=shown,
    )


def _report(target: Path, manifest: Manifest) -> None:
    size = sum(array.size_bytes for array in manifest.arrays.values())
    mtp = "with its MTP block" if manifest.has_mtp else "without an MTP block"
    fp8 = f", {len(manifest.quantized)} of its weights in FP8" if manifest.quantized else ""
    print(f"{target}: {len(manifest.arrays)} arrays, {size:,} bytes, {mtp}{fp8}")


def _write_groups(plan: Plan, folder: Path, progress: Progress) -> None:
    done = done_groups(folder)
    sizes = _group_bytes(plan)
    if done:
        logger.info("%d of %d groups are written already", len(done), len(sizes))
    remaining = sum(size for group, size in sizes.items() if group not in done)
    check_space(folder, remaining)
    with progress("converting", remaining) as advance:
        for group, arrays in plan.groups.items():
            if group not in done:
                write_group(folder / PARAMS / group, arrays, advance)


def _group_bytes(plan: Plan) -> dict[str, int]:
    return {
        group: sum(array.stored.size_bytes for array in arrays.values())
        for group, arrays in plan.groups.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert/hf_to_orbax.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help="folder of the HF checkpoint (config.json, ...)"
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="folder to make; serve it with --model OUT"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast to this dtype and dequantise FP8 weights; the default keeps what is stored",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="quantise a BF16 checkpoint's linear layers, as the official FP8 releases do",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="reread OUT and compare every tensor with IN, bit for bit; if OUT is finished "
        "already, do only that",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="convert again though OUT is finished; it is replaced once the new one is whole",
    )
    return parser


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("convert")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


if __name__ == "__main__":
    sys.exit(main())
