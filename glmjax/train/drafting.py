"""How many drafts of the MTP block would be accepted: `python -m glmjax.train.drafting --help`.

All chains of drafts of a text are computed at once: one chain starts at each of its positions, and
sees what the block would have in its KV cache there.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from glmjax.bundled import converted
from glmjax.config import MeshConfig, ModelConfig
from glmjax.devices import mesh_for
from glmjax.errors import GlmjaxError
from glmjax.llm import LLM
from glmjax.model.decoder import Decoder
from glmjax.model.layers import embed
from glmjax.model.mtp import MTP
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import placement, shard_map
from glmjax.text.chat import ChatTemplate
from glmjax.train.arguments import positive
from glmjax.train.data.encode import render_prompt
from glmjax.train.data.mixture import draw
from glmjax.train.sequences import Sequences
from pallas_kernels.backend import Backend
from pallas_kernels.packed_attention import NEG_INF
from pallas_kernels.rope import Rotation, rotate

TEXT_TOKENS = 512
MAX_NEW_TOKENS = 256

Keys = tuple[tuple[jax.Array, jax.Array], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chains:
    """A `glmjax.model.attention.Layout` of T chains of drafts, one from each position of a text.

    The first pass of the block is over the text itself. In pass n each chain adds a token behind
    its start; it sees the text up to its start and what it added itself.

    Attributes:
        positions: int32 [T], where this pass's tokens stand.
        valid: bool [T].
    """

    positions: jax.Array
    valid: jax.Array

    def attend(
        self,
        qkv: jax.Array,
        rotation: Rotation,
        kv: Keys,
        layer: jax.Array,
        scale: float,
        backend: Backend,
    ) -> tuple[jax.Array, Keys]:
        """qkv [T, K, G + 2, h]; `kv` holds keys and values of the passes before."""
        del layer, backend
        q, k, v = rotate(qkv, rotation)
        kv = (*kv, (k, v))
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        text_k, text_v = kv[0]
        causal = jnp.tri(q.shape[0], dtype=bool)[:, None, None]
        scores = jnp.where(causal, jnp.einsum("tkgh,skh->tkgs", grouped, text_k), NEG_INF)
        own = [jnp.einsum("tkgh,tkh->tkg", grouped, k)[..., None] for k, _ in kv[1:]]
        weights = jax.nn.softmax(scale * jnp.concatenate([scores, *own], -1), axis=-1)
        out = jnp.einsum("tkgs,skh->tkgh", weights[..., : q.shape[0]], text_v)
        for i, (_, v) in enumerate(kv[1:]):
            out += weights[..., q.shape[0] + i, None] * v[:, :, None]
        return out.reshape(q.shape), kv


class Drafter:
    """Drafts from every position of a text.

    Args:
        config, params, mtp: a model in float32, as `glmjax.runner.weights` restores it.
        steps: drafts a chain.
    """

    def __init__(self, config: ModelConfig, params: Any, mtp: Any, mesh: Mesh, steps: int):
        self._config, self._steps, self._params = config, steps, (params, mtp)
        axes = placement(params), placement(mtp), (None,), (None,)
        self._run = jax.jit(shard_map(self._chains, mesh, axes, (None, None)))

    def drafts(self, token_ids: Sequence[int]) -> np.ndarray:
        """Drafts int32 [tokens, steps]: row t holds what follows token t + 1, given all up to it.

        Raises:
            ValueError: more than TEXT_TOKENS tokens.
        """
        if len(token_ids) > TEXT_TOKENS:
            raise ValueError(f"{len(token_ids)} tokens, expected at most {TEXT_TOKENS}")
        missing = TEXT_TOKENS - len(token_ids)
        ids = np.pad(np.asarray(token_ids, np.int32), (0, missing))
        valid = np.arange(TEXT_TOKENS) < len(token_ids)
        return np.asarray(self._run(*self._params, ids, valid))[: len(token_ids)]

    def _chains(self, params: Any, mtp: Any, ids: jax.Array, valid: jax.Array) -> jax.Array:
        decoder = nnx.merge(nnx.graphdef(Decoder(self._config)), nnx.State(params))
        block = nnx.merge(nnx.graphdef(MTP(self._config)), nnx.State(mtp))
        places = jnp.arange(ids.shape[0], dtype=jnp.int32)
        text = Sequences(valid[None].astype(jnp.int32), places[None])
        hidden, _, _ = decoder(ids, None, text)
        following, kv, found = jnp.roll(ids, -1), (), []
        for step in range(self._steps):
            embedded = embed(following, decoder.embed_tokens.get_value())
            layout = Chains(places + step, valid)
            layer = self._config.num_hidden_layers
            hidden, kv, _ = block(embedded, hidden, kv, layout, layer)
            following = decoder.logits(hidden).argmax(-1).astype(jnp.int32)
            found.append(following)
        return jnp.stack(found, axis=1)


@dataclass
class Acceptance:
    """What became of drafts.

    Attributes:
        verifications: how often the target model checked a chain.
        tokens: how many tokens these gave, the target's own one after each chain included.
        accepted: by step of the chain.
    """

    verifications: int = 0
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)

    def add(self, prompt: int, ids: Sequence[int], drafts: np.ndarray) -> None:
        """Go through a text whose first `prompt` tokens are given and whose next one is sampled."""
        self.accepted = self.accepted or [0] * drafts.shape[1]
        at = prompt - 1
        while at + 2 < len(ids):
            truth = ids[at + 2 : at + 2 + drafts.shape[1]]
            agree = np.cumprod([d == t for d, t in zip(drafts[at], truth, strict=False)])
            length = int(agree.sum())
            self.verifications += 1
            gained = min(length + 1, len(ids) - at - 2)
            self.tokens += gained
            for step in range(length):
                self.accepted[step] += 1
            at += gained

    def report(self) -> str:
        """One line a figure."""
        shares = ", ".join(f"{n / self.verifications:.2f}" for n in self.accepted)
        mean = self.tokens / self.verifications
        return (
            f"verifications: {self.verifications}\n"
            f"tokens a verification: {mean:.2f}\n"
            f"accepted, by step of the chain: {shares}"
        )


def measure(folder: Path, chats: int, steps: int, seed: int) -> Acceptance:
    """Drafting on held-out chats that the model continues greedily, in float32."""
    mesh = mesh_for(MeshConfig())
    config, params = load(folder, mesh, "float32")
    drafter = Drafter(config, params, load_mtp(folder, mesh, "float32"), mesh, steps)
    prompts = _prompts(folder, chats, seed)
    llm = LLM(folder, dtype="float32")
    encoded = [llm.served.tokenizer.encode(prompt) for prompt in prompts]
    answers = llm.generate(encoded, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS, progress=True)
    assert isinstance(answers, list)
    total = Acceptance()
    for prompt, answer in tqdm(zip(encoded, answers, strict=True), "drafting", len(prompts)):
        ids = [*prompt, *answer.token_ids]
        if len(ids) <= TEXT_TOKENS:
            total.add(len(prompt), ids, drafter.drafts(ids))
    return total


def _prompts(folder: Path, chats: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    return [render_prompt(draw(rng, "held_out"), template) for _ in range(chats)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.train.drafting",
        description="Count how many drafts of a model's MTP block greedy decoding would accept.",
    )
    p.add_argument("--model", type=Path, help="converted folder; default: the bundled glm-nano")
    p.add_argument("--chats", type=positive, default=200, help="held-out chats; default 200")
    p.add_argument("--steps", type=positive, default=3, help="drafts a verification; default 3")
    p.add_argument("--seed", type=int, default=0, help="of the chats; default 0")
    return p


def main() -> int:
    """Exit status: 0 when measured, 1 when the model could not be loaded."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        print(measure(args.model or converted(), args.chats, args.steps, args.seed).report())
    except GlmjaxError as error:
        print(f"glmjax.train.drafting: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
