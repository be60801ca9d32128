"""Serve a GLM-4.5 model: OpenAI's HTTP API and SGLang's gRPC. See `python serve.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import logging
import math
import sys
from pathlib import Path

from glmjax.build import build
from glmjax.bundled import converted
from glmjax.config import (
    DTYPES,
    KV_CHOICES,
    CacheConfig,
    MeshConfig,
    ModelConfig,
    SchedulerConfig,
)
from glmjax.devices import KERNELS, cache_folder, prepare
from glmjax.errors import ConfigError, GlmjaxError
from glmjax.server.serving import check_free, serve

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
ALGORITHMS = ("EAGLE", "NEXTN")
DRAFTING = """A model with an MTP block drafts tokens ahead and verifies them all at once: the same
answers, faster. The options are called as in SGLang."""

EPILOG = """examples:
  python serve.py                                 the bundled glm-nano, to see it work
  python serve.py --model glm-4.5-air --mesh 8    tensor parallel over 8 devices
  python serve.py --model glm-4.5-air --mesh 2x4  2 data groups of tensor parallel 4
  python serve.py --speculative-num-steps 0       one token a step, without drafting

Without a GPU the devices are virtual ones on the CPU.
Ctrl-C or SIGTERM: finish what runs, then exit; once more: exit at once.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Serve a GLM-4.5 model over HTTP (OpenAI) and gRPC (SGLang).",
        epilog=EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36
        ),
    )
    for add_options in (_model_options, _network_options, _capacity_options, _drafting_options):
        add_options(p)
    return p


def _model_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("what is served, on what").add_argument
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="folder that convert/hf_to_orbax.py wrote; default: glm-nano, a tiny model that comes "
        "with glmjax",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model; default: the folder's name",
    )
    add(
        "--mesh",
        default="1",
        metavar="N|DxT",
        help="devices: N (tensor parallel) or DxT (D data groups of tensor parallel T); default 1",
    )
    add("--dtype", choices=DTYPES, help="of weights, activations and KV; default: the checkpoint's")
    add(
        "--deterministic",
        "--enable-deterministic-inference",
        action="store_true",
        help="round alike in every batch, at a cost in speed: an answer depends on nothing but its "
        "own request",
    )
    add(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="how operations are computed: ref (plain jax.numpy), triton or mosaic (kernels for "
        "NVIDIA GPUs; on a CPU interpreted, very slowly); auto, the default: mosaic on H100 "
        "and H200, ref elsewhere",
    )
    add(
        "--compile-cache",
        type=Path,
        metavar="FOLDER",
        default=cache_folder() / "xla",
        help="folder that keeps compiled programs for the next start; default %(default)s",
    )


def _network_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("where clients find it")
    add, port = group.add_argument, functools.partial(group.add_argument, type=_port, metavar="N")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    port("--port", default=30000, help="HTTP; 0: any free one; default 30000")
    port("--grpc-port", default=30001, help="gRPC; 0: any free one; default 30001")
    add(
        "--drain-timeout-s",
        type=_positive,
        default=30.0,
        metavar="S",
        help="for requests that run when told to stop; default 30",
    )


def _capacity_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("how much at once")
    add, number = group.add_argument, functools.partial(group.add_argument, type=int, metavar="N")
    number("--max-running-requests", default=32, help="at once; default 32")
    number("--max-queued-requests", default=1024, help="more are refused; default 1024")
    number("--max-seq-len", help="prompt and output together; default: the model's")
    number("--chunked-prefill-size", default=256, help="prompt tokens a step; default 256")
    number("--page-size", default=16, help="tokens a KV page; default 16")
    add(
        "--kv-cache-gib",
        type=_positive,
        default=1.0,
        metavar="X",
        help="KV pool of each device; default 1",
    )
    add(
        "--kv-cache-dtype",
        choices=KV_CHOICES,
        default="auto",
        help="of the KV pool: fp8_e4m3 holds twice the tokens, a little less exactly; auto, the "
        "default: as the model computes",
    )
    add(
        "--disable-radix-cache",
        action="store_true",
        help="compute every prompt anew: else prompts that begin alike share what was computed",
    )


def _drafting_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("drafting", DRAFTING)
    add, number = group.add_argument, functools.partial(group.add_argument, metavar="N")
    add(
        "--speculative-algorithm",
        choices=ALGORITHMS,
        type=str.upper,
        help="both mean the MTP block, which the model must have if this is given; default: NEXTN "
        "where it has one",
    )
    number(
        "--speculative-num-steps",
        type=int,
        default=3,
        help="drafts ahead of each token; 0: no drafting; default 3",
    )
    number(
        "--speculative-eagle-topk",
        type=_chain,
        default=1,
        help="drafts at each place; only 1, a chain, is served",
    )
    number(
        "--speculative-num-draft-tokens",
        type=int,
        help="tokens verified at once; only one more than the steps is served",
    )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port, expected 0 to 65535")
    return port


def _chain(text: str) -> int:
    if int(text) != 1:
        raise argparse.ArgumentTypeError(
            f"a draft tree is not served: {text} drafts at each place were asked for, expected 1"
        )
    return 1


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def scheduler_config(args: argparse.Namespace) -> SchedulerConfig:
    """How requests share the device. Raises ConfigError for sizes that cannot be."""
    steps, verified = args.speculative_num_steps, args.speculative_num_draft_tokens
    if verified not in (None, steps + 1):
        raise ConfigError(
            f"--speculative-num-draft-tokens is {verified}, but a chain of "
            f"--speculative-num-steps {steps} has {steps + 1} tokens to verify; give {steps + 1} "
            "or leave it out"
        )
    return SchedulerConfig(
        args.max_running_requests,
        args.max_queued_requests,
        args.chunked_prefill_size,
        args.max_seq_len,
        speculative_num_steps=steps,
        prefix_cache=not args.disable_radix_cache,
        deterministic=args.deterministic,
    )


def cache_config(args: argparse.Namespace) -> CacheConfig:
    """The KV pool. Raises ConfigError for sizes that cannot be."""
    memory_bytes = int(args.kv_cache_gib * 2**30)
    return CacheConfig(args.page_size, None, memory_bytes, args.kv_cache_dtype)


def check_drafting(args: argparse.Namespace, folder: Path) -> None:
    """Raise ConfigError when drafting was asked for of a model that cannot draft."""
    if args.speculative_algorithm and not ModelConfig.from_hf(folder).num_nextn_predict_layers:
        raise ConfigError(
            f"--speculative-algorithm is {args.speculative_algorithm}, but {folder} has no MTP "
            "block (num_nextn_predict_layers is 0); leave it out"
        )


def run(args: argparse.Namespace) -> None:
    """Build the engine and serve until told to stop."""
    mesh, scheduler = MeshConfig.parse(args.mesh), scheduler_config(args)
    check_free(args.host, args.port, args.grpc_port)
    prepare(mesh.size, args.compile_cache)
    folder = args.model or converted(mesh.size)
    check_drafting(args, folder)
    cache = cache_config(args)
    names = args.served_model_name, args.kernels
    engine, served = build(folder, mesh, args.dtype, cache, scheduler, *names)
    gc.collect()
    gc.freeze()  # what is built by now stays: walking through it would stop a step for 0.1 s
    asyncio.run(serve(engine, served, args.host, args.port, args.grpc_port, args.drain_timeout_s))


def main() -> int:
    """Exit status: 0 after a clean stop, 1 when it could not serve."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    for library in ("absl", "jax"):  # a dozen lines a restored layer, none of them for people
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        run(args)
    except GlmjaxError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
