"""Serve a GLM-4.5 model: OpenAI's HTTP API and SGLang's gRPC. See `python serve.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import gc
import logging
import math
import os
import sys
from pathlib import Path

from glmjax.build import build
from glmjax.bundled import converted
from glmjax.config import (
    DTYPES,
    KV_CHOICES,
    MEMORY_FRACTION,
    SIZES,
    CacheConfig,
    MeshConfig,
    ModelConfig,
    SchedulerConfig,
    Sizes,
)
from glmjax.devices import KERNELS, cache_folder, platform, prepare
from glmjax.errors import ConfigError, GlmjaxError
from glmjax.hosts.agreement import agreement
from glmjax.hosts.connect import connect
from glmjax.hosts.joining import place_of
from glmjax.hosts.roles import joined
from glmjax.planner import command as planning
from glmjax.server.access import Access
from glmjax.server.served import PARSERS
from glmjax.server.serving import check_free, serve

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
KEYS_OF_ENVIRONMENT = "GLMJAX_API_KEY"
ALGORITHMS = ("EAGLE", "NEXTN")
DRAFTING = """A model with an MTP block drafts tokens ahead and verifies them all at once: the same
answers, faster. The options are called as in SGLang."""

READING = """Chat answers are taken apart into thought, text and tool calls. glm: as the chat
template writes them; glm45 (GLM-4.5 and 4.6: a line for each part of a call) and glm47 (all on one
line) say so against the template; none: they stay in the text, and requests with tools are
refused."""

HOSTS = """One model over the devices of several machines: run the same command on each, but for
--host-index. Host 0 schedules and answers requests; the others compute with it. They meet at ports
PORT (JAX) and PORT + 1 (plans) of host 0, and JAX opens more between all of them: on a private
network only, since nothing is authenticated or encrypted. When a host is gone the service ends on
all of them."""

# What may differ between hosts; all other options must be the same.
OWN = {"host", "port", "grpc-port", "host-index", "coordinator", "model", "served-model-name"} | {
    "api-key",
    "allowed-origins",
    "compile-cache",
    "drain-timeout-s",
    "reasoning-parser",
    "tool-call-parser",
}

EPILOG = """examples:
  python serve.py                                 the bundled glm-nano, to see it work
  python serve.py --model glm-4.5-air --mesh 8    tensor parallel over 8 devices
  python serve.py --model glm-4.5-air --mesh 2x4  2 data groups of tensor parallel 4
  python serve.py --model glm-4.5 --mesh 16 --hosts 2 --host-index 0 \\
                  --coordinator 10.0.0.1:9000     and on another machine with --host-index 1
  python serve.py --speculative-num-steps 0       one token a step, without drafting
  python serve.py --plan --model zai-org/GLM-4.5-FP8 --mesh 8 --device h100
                                                  does it fit, how many requests, how fast at best

Without a GPU the devices are virtual ones on the CPU.
Ctrl-C or SIGTERM: finish what runs, then exit; once more: exit at once.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Serve a GLM-4.5 model: HTTP (OpenAI, Anthropic, SGLang) and gRPC (SGLang).",
        epilog=EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36
        ),
    )
    for add_options in (
        _model_options,
        _hosts_options,
        _network_options,
        _reading_options,
        _capacity_options,
        _drafting_options,
        planning.add_options,
    ):
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
        nargs="+",
        metavar="NAME",
        help="what clients may call the model, the first being what it is told as; default: the "
        "folder's name",
    )
    add(
        "--mesh",
        default="1",
        metavar="N|DxT",
        help="devices: N (tensor parallel) or DxT (D data groups of tensor parallel T); default 1",
    )
    add(
        "--expert-parallel",
        action="store_true",
        help="each device of a group has whole experts, rather than a part of every expert's "
        "width. Pays where parts are too narrow: FP8 kernels take GLM-4.5-Air's experts whole, "
        "but not their eighths; and prefill has larger tiles. A step waits for the device whose "
        "experts are chosen most",
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


def _hosts_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("several hosts", HOSTS).add_argument
    add("--hosts", type=int, default=1, metavar="N", help="machines in all; default 1")
    add("--host-index", type=int, metavar="I", help="which this one is, 0 to N - 1")
    add("--coordinator", default="", metavar="HOST:PORT", help="of host 0, as the others reach it")


def _network_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("where clients find it")
    add, port = group.add_argument, functools.partial(group.add_argument, type=_port, metavar="N")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    port("--port", default=30000, help="HTTP; 0: any free one; default 30000")
    port("--grpc-port", default=30001, help="gRPC; 0: any free one; default 30001")
    add(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="what clients must send, as 'authorization: Bearer KEY' or 'x-api-key: KEY', but for "
        "/health and /metrics; default: those in the environment's GLMJAX_API_KEY, which other "
        "users of the machine cannot read; with neither, all may ask",
    )
    add(
        "--allowed-origins",
        nargs="+",
        default=(),
        metavar="ORIGIN",
        help="web pages that may ask from a browser, as https://chat.example.com; '*': all; "
        "default: none",
    )
    add(
        "--drain-timeout-s",
        type=_positive,
        default=30.0,
        metavar="S",
        help="for requests that run when told to stop; default 30",
    )


def _reading_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("how answers are read", READING)
    parser = functools.partial(group.add_argument, choices=PARSERS, default="glm")
    parser("--reasoning-parser", help="of thoughts, alike in all forms; default glm")
    parser("--tool-call-parser", help="of tool calls; default glm")


def _capacity_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("how much at once")
    add, number = group.add_argument, functools.partial(group.add_argument, type=int, metavar="N")
    number("--max-running-requests", help="at once; default 32, on GPUs 128")
    number("--max-queued-requests", default=1024, help="more are refused; default 1024")
    number("--max-seq-len", help="prompt and output together; default: the model's")
    number("--chunked-prefill-size", help="prompt tokens a step; default 256, on GPUs 2048")
    number("--page-size", help="tokens a KV page; default 16, on GPUs 64")
    add(
        "--kv-cache-gib",
        type=_positive,
        metavar="X",
        help="KV pool of each device; default: what a GPU has left beside weights and temporaries, "
        "1 on a CPU",
    )
    add(
        "--memory-fraction",
        type=_fraction,
        default=MEMORY_FRACTION,
        metavar="X",
        help="of a GPU's memory, what is used in all; the rest is for CUDA and NCCL; default "
        "%(default)g",
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


def _fraction(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def scheduler_config(args: argparse.Namespace, sizes: Sizes) -> SchedulerConfig:
    """How requests share the device. Raises ConfigError for sizes that cannot be."""
    steps, verified = args.speculative_num_steps, args.speculative_num_draft_tokens
    if verified not in (None, steps + 1):
        raise ConfigError(
            f"--speculative-num-draft-tokens is {verified}, but a chain of "
            f"--speculative-num-steps {steps} has {steps + 1} tokens to verify; give {steps + 1} "
            "or leave it out"
        )
    return SchedulerConfig(
        _said(args.max_running_requests, sizes.max_running_requests),
        args.max_queued_requests,
        _said(args.chunked_prefill_size, sizes.chunked_prefill_size),
        args.max_seq_len,
        speculative_num_steps=steps,
        prefix_cache=not args.disable_radix_cache,
        deterministic=args.deterministic,
    )


def cache_config(args: argparse.Namespace, sizes: Sizes) -> CacheConfig:
    """The KV pool. Raises ConfigError for sizes that cannot be."""
    memory_bytes = args.kv_cache_gib and max(int(args.kv_cache_gib * 2**30), 1)
    page_size = _said(args.page_size, sizes.page_size)
    return CacheConfig(page_size, None, memory_bytes, args.kv_cache_dtype)


def _said(value: int | None, default: int) -> int:
    return default if value is None else value


def access_of(args: argparse.Namespace) -> Access:
    """Who may ask. Raises ConfigError for keys and origins that cannot be."""
    said = os.environ.get(KEYS_OF_ENVIRONMENT)
    if said is not None and not said.split():
        raise ConfigError(f"{KEYS_OF_ENVIRONMENT} is set, but holds no API key; unset it for none")
    return Access(tuple(args.api_key or (said or "").split()), tuple(args.allowed_origins))


def check_drafting(args: argparse.Namespace, folder: Path) -> None:
    """Raise ConfigError when drafting was asked for of a model that cannot draft."""
    if args.speculative_algorithm and not ModelConfig.from_hf(folder).num_nextn_predict_layers:
        raise ConfigError(
            f"--speculative-algorithm is {args.speculative_algorithm}, but {folder} has no MTP "
            "block (num_nextn_predict_layers is 0); leave it out"
        )


def run_plan(args: argparse.Namespace) -> int:
    """Print what a server on GPUs would take."""
    if args.model is None:
        raise ConfigError("--plan needs --model: a folder, or a name like zai-org/GLM-4.5-FP8")
    mesh, sizes = parse_mesh(args), SIZES["gpu"]
    mesh = mesh if args.hosts > 1 else mesh.on_hosts()
    return planning.run(args, mesh, cache_config(args, sizes), scheduler_config(args, sizes))


def parse_mesh(args: argparse.Namespace) -> MeshConfig:
    """The devices. Raises ConfigError for a mesh that cannot be."""
    return MeshConfig.parse(args.mesh, expert_parallel=args.expert_parallel, hosts=args.hosts)


def run(args: argparse.Namespace) -> None:
    """Build the engine and serve until told to stop."""
    mesh = parse_mesh(args)
    for configure in (scheduler_config, cache_config):  # what cannot be is told before JAX starts
        configure(args, SIZES["cpu"])
    access = access_of(args)
    place = place_of(args.hosts, args.host_index, args.coordinator)
    ports = args.host, args.port, args.grpc_port
    if place.index == 0:
        check_free(*ports)
    prepare(mesh.devices_per_host, args.compile_cache, args.memory_fraction)
    folder = args.model or converted(mesh.size, apart=args.hosts > 1)
    check_drafting(args, folder)
    name, *aliases = args.served_model_name or [None]
    with joined(place, agreement(shared(args), folder)) as role:
        connect(place, mesh)
        sizes = SIZES[platform()]
        configs = cache_config(args, sizes), scheduler_config(args, sizes)
        options = args.dtype, *configs, name, args.kernels
        engine, served = build(folder, mesh, *options, role.over)
        served = dataclasses.replace(
            served,
            aliases=tuple(aliases),
            reasoning_parser=args.reasoning_parser,
            tool_call_parser=args.tool_call_parser,
        )
        gc.collect()
        gc.freeze()  # what is built by now stays: walking through it would stop a step for 0.1 s
        answer = functools.partial(serve, engine, served, access, *ports, args.drain_timeout_s)
        role.run(lambda watch: asyncio.run(answer(watch)))


def shared(args: argparse.Namespace) -> dict[str, object]:
    """The options that every host must have alike, by name."""
    options = {name.replace("_", "-"): value for name, value in vars(args).items()}
    return {f"--{name}": value for name, value in options.items() if name not in OWN}


def main() -> int:
    """Exit status: 0 after a clean stop or a plan that fits, 1 when it could not serve."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    for library in ("absl", "jax"):  # a dozen lines a restored layer, none of them for people
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        if args.plan:
            return run_plan(args)
        run(args)
    except GlmjaxError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
