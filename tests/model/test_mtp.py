"""The MTP block against a float32 reference in numpy, written from its description."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from cases import CASES, prompt_ids
from glmjax.model.mtp import MTP
from harness import Forward

CONFIG = CASES["qk_norm"]
TOLERANCE = 1e-4


class Reference:
    """One block, all positions at once, from the checkpoint's own tensors."""

    def __init__(self, folder):
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        prefix = f"model.layers.{CONFIG.num_hidden_layers}."
        self.block = {k.removeprefix(prefix): v for k, v in tensors.items() if prefix in k}
        self.embed, self.head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]

    def __call__(self, next_ids, hidden):
        """Tokens at t + 1 and main states at t -> logits, states after shared_head.norm."""
        w = self.block
        parts = [
            self.norm(self.embed[next_ids], "enorm"),
            self.norm(hidden, "hnorm"),
        ]
        x = np.concatenate(parts, -1) @ w["eh_proj.weight"].T
        x = x + self.attention(self.norm(x, "input_layernorm"))
        x = x + self.moe(self.norm(x, "post_attention_layernorm"))
        y = self.norm(x, "shared_head.norm")
        return y @ self.head.T, y

    def norm(self, x, name):
        scale = np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps)
        return x / scale * self.block[f"{name}.weight"]

    def heads(self, x, name):
        w = self.block
        y = x @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]
        return y.reshape(len(x), -1, CONFIG.head_dim)

    def rope(self, x):
        r = CONFIG.rotary_dim
        angles = np.arange(len(x))[:, None] * CONFIG.rope_theta ** (-np.arange(0, r, 2) / r)
        z = x[..., : r // 2] + 1j * x[..., r // 2 : r]
        z = z * np.exp(1j * angles)[:, None]
        return np.concatenate([z.real, z.imag, x[..., r:]], -1)

    def attention(self, x):
        q, k = (self.rope(self.norm(self.heads(x, n), f"self_attn.{n}_norm")) for n in ("q", "k"))
        group = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
        k, v = (np.repeat(a, group, 1) for a in (k, self.heads(x, "v")))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(CONFIG.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
        return out.reshape(len(x), -1) @ self.block["self_attn.o_proj.weight"].T

    def mlp(self, x, name):
        gate, up, down = (
            self.block[f"mlp.{name}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        g = gate @ x
        return down @ (g / (1 + np.exp(-g)) * (up @ x))

    def moe(self, x):
        out = np.zeros_like(x)
        for t, row in enumerate(x):
            scores = 1 / (1 + np.exp(-(self.block["mlp.gate.weight"] @ row)))
            choice = scores + self.block["mlp.gate.e_score_correction_bias"]
            best = np.argsort(-choice)[: CONFIG.num_experts_per_tok]
            total = scores[best].sum()
            for e in best:
                weight = CONFIG.routed_scaling_factor * scores[e] / total
                out[t] += weight * self.mlp(row, f"experts.{e}")
            out[t] += self.mlp(row, "shared_experts")
        return out


def difference(got, expected) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def chain(forward: Forward, drafts: int = 3):
    """Main prefill, then drafts from its last state: logits and states of each draft."""
    ids = prompt_ids(CONFIG)
    logits, hidden = forward.main(ids)
    tokens = np.append(ids[1:], logits[-1].argmax()).astype(np.int32)
    steps = []
    for _ in range(drafts):
        logits, states = forward.draft(tokens, hidden)
        steps.append((tokens, hidden, logits, states))
        tokens, hidden = logits[-1:].argmax(-1).astype(np.int32), states[-1:]
    return steps


def worst_difference(steps, reference: Reference) -> float:
    """Replays a chain in the reference, feeding back its own states."""
    tokens, hidden = steps[0][0], steps[0][1]
    expected, states = reference(tokens, hidden)
    worst = difference(steps[0][2], expected)
    for drafted, _, logits, _ in steps[1:]:
        tokens, hidden = np.append(tokens, drafted), np.concatenate([hidden, states[-1:]])
        expected, states = reference(tokens, hidden)
        worst = max(worst, difference(logits[-1], expected[-1]))
    return worst


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_chain_of_drafts_equals_the_reference(tensor, load_case, checkpoint):
    config, mesh, params, mtp = load_case("qk_norm", tensor, mtp=True)
    steps = chain(Forward(config, mesh, params, mtp))
    reference = Reference(checkpoint("qk_norm"))
    first = reference(steps[0][0], steps[0][1])
    assert difference(steps[0][3], first[1]) < TOLERANCE
    assert worst_difference(steps, reference) < TOLERANCE


def test_swapped_halves_of_eh_proj_would_be_seen(load_case, checkpoint):
    config, mesh, params, mtp = load_case("qk_norm", 1, mtp=True)
    halves = np.split(np.asarray(mtp["eh_proj"]), 2, axis=-1)
    halves = jax.device_put(np.concatenate(halves[::-1], -1), mtp["eh_proj"].sharding)
    swapped = mtp | {"eh_proj": halves}
    steps = chain(Forward(config, mesh, params, swapped), drafts=1)
    assert worst_difference(steps, Reference(checkpoint("qk_norm"))) > 100 * TOLERANCE


def test_chaining_the_state_before_its_norm_would_be_seen(load_case, checkpoint, monkeypatch):
    """The block's last norm is applied for the logits only, as one public engine does."""

    class PreNorm(Forward):
        def draft(self, ids, hidden):
            logits, states = super().draft(ids, hidden)
            weight = np.asarray(self.mtp["shared_head_norm"])
            return logits, states / weight  # the same direction, not yet weighted

    config, mesh, params, mtp = load_case("qk_norm", 1, mtp=True)
    steps = chain(PreNorm(config, mesh, params, mtp))
    assert worst_difference(steps, Reference(checkpoint("qk_norm"))) > 100 * TOLERANCE


def test_the_block_declares_its_own_vectors():
    block = MTP(replace(CONFIG, num_hidden_layers=1))
    assert block.vectors.input_layernorm.get_value().shape == (1, CONFIG.hidden_size)
    assert jax.tree.leaves(block) != []
