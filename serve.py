"""Serve a GLM-4.5 model: OpenAI's HTTP API and SGLang's gRPC. See `python serve.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from pathlib import Path

from glmjax.build import build
from glmjax.bundled import converted
from glmjax.config import DTYPES, CacheConfig, MeshConfig, SchedulerConfig
from glmjax.devices import cache_folder, prepare
from glmjax.errors import GlmjaxError
from glmjax.server.serving import check_free, serve

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

EPILOG = """examples:
  python serve.py                                 the bundled glm-nano, to see it work
  python serve.py --model glm-4.5-air --mesh 8    tensor parallel over 8 devices
  python serve.py --model glm-4.5-air --mesh 2x4  2 data groups of tensor parallel 4

Without a GPU the devices are virtual ones on the CPU.
Ctrl-C or SIGTERM: finish what runs, then exit; once more: exit at once.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Serve a GLM-4.5 model over HTTP (OpenAI) and gRPC (SGLang).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add(
        "--model",
        type=Path,
        help="folder that convert/hf_to_orbax.py wrote; default: glm-nano, a tiny model that comes "
        "with glmjax",
    )
    add(
        "--mesh",
        default="1",
        help="devices: N (tensor parallel) or DxT (D data groups of tensor parallel T); default 1",
    )
    add("--dtype", choices=DTYPES, help="of weights, activations and KV; default: the checkpoint's")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    add("--port", type=_port, default=30000, help="HTTP; 0: any free one; default 30000")
    add("--grpc-port", type=_port, default=30001, help="gRPC; 0: any free one; default 30001")
    add("--served-model-name", help="what clients call the model; default: the folder's name")
    add("--max-running-requests", type=int, default=32, help="at once; default 32")
    add("--max-queued-requests", type=int, default=1024, help="more are refused; default 1024")
    add("--max-seq-len", type=int, help="prompt and output together; default: the model's")
    add("--chunked-prefill-size", type=int, default=256, help="prompt tokens a step; default 256")
    add("--page-size", type=int, default=16, help="tokens a KV page; default 16")
    add("--kv-cache-gib", type=_positive, default=1.0, help="KV pool of each device; default 1")
    add(
        "--drain-timeout-s",
        type=_positive,
        default=30.0,
        help="for requests that run when told to stop; default 30",
    )
    add(
        "--compile-cache",
        type=Path,
        default=cache_folder() / "xla",
        help="folder that keeps compiled programs for the next start; default %(default)s",
    )
    return p


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port, expected 0 to 65535")
    return port


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def run(args: argparse.Namespace) -> None:
    """Build the engine and serve until told to stop."""
    mesh = MeshConfig.parse(args.mesh)
    check_free(args.host, args.port, args.grpc_port)
    prepare(mesh.size, args.compile_cache)
    engine, served = build(
        args.model or converted(mesh.size),
        mesh,
        args.dtype,
        CacheConfig(args.page_size, memory_bytes=int(args.kv_cache_gib * 2**30)),
        SchedulerConfig(
            args.max_running_requests,
            args.max_queued_requests,
            args.chunked_prefill_size,
            args.max_seq_len,
        ),
        args.served_model_name,
    )
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
