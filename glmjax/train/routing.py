"""How evenly a model's routers load its experts: `python -m glmjax.train.routing --help`."""

from __future__ import annotations

import argparse
import logging
import random
import sys
from pathlib import Path

import numpy as np

from glmjax.bundled import converted
from glmjax.config import MeshConfig
from glmjax.devices import mesh_for
from glmjax.errors import CheckpointError, GlmjaxError
from glmjax.runner.weights import load, load_mtp
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.arguments import positive
from glmjax.train.data.packing import pack_batch
from glmjax.train.step import make_measure, put

ROWS, SEQ_LEN = 16, 512


def expert_shares(folder: Path, batches: int, seed: int) -> dict[str, np.ndarray]:
    """Load of each expert on held-out text, 1 being an even share: [E] for each MoE layer.

    Raises:
        CheckpointError: no converted model with an MTP block and a chat template at `folder`.
    """
    mesh = mesh_for(MeshConfig())
    config, model = load(folder, mesh, "float32")
    params = {"model": model, "mtp": load_mtp(folder, mesh, "float32")}
    template, tokenizer = ChatTemplate.from_folder(folder), Tokenizer.from_folder(folder)
    if template is None:
        raise CheckpointError(f"{folder} has no chat template; name a chat model")
    measure, rng = make_measure(config, mesh), random.Random(seed)
    names = [*map(str, range(config.first_k_dense_replace, config.num_hidden_layers)), "MTP"]
    total = np.zeros((len(names), config.n_routed_experts))
    for _ in range(batches):
        packed = pack_batch(rng, "held_out", template, tokenizer, ROWS, SEQ_LEN)
        metrics = measure(params, put(packed, mesh))
        total += np.concatenate([metrics["load"], metrics["mtp_load"]])
    return dict(zip(names, total / total.mean(-1, keepdims=True), strict=True))


def table(shares: dict[str, np.ndarray]) -> str:
    """The report as a Markdown table."""
    lines = ["| layer | least loaded expert | most loaded expert |", "|---|---|---|"]
    lines += [f"| {name} | {row.min():.2f} | {row.max():.2f} |" for name, row in shares.items()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.train.routing",
        description="Show how evenly held-out text loads a model's experts; 1 is an even share.",
    )
    p.add_argument("--model", type=Path, help="converted folder; default: the bundled glm-nano")
    p.add_argument("--batches", type=positive, default=8, help="of 8,192 tokens; default 8")
    p.add_argument("--seed", type=int, default=0, help="of the text; default 0")
    return p


def main() -> int:
    """Exit status: 0 when measured, 1 when the model could not be loaded."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        shares = expert_shares(args.model or converted(), args.batches, args.seed)
    except GlmjaxError as error:
        print(f"glmjax.train.routing: {error}", file=sys.stderr)
        return 1
    print(table(shares))
    return 0


if __name__ == "__main__":
    sys.exit(main())
