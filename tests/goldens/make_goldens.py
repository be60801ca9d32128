"""Writes what transformers computes for the models in tests/cases.py. Needs torch: make goldens.

A case's golden holds float32 logits [24, V] of a prompt; "served" holds the int32 [16, 64] tokens
that greedy decoding adds to 16 prompts.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Glm4MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES, GOLDENS, SEED, SERVED_TOKENS, prompt_ids, served_prompts
from glmjax.bench.synthetic import default_config, write_checkpoint
from glmjax.config import ModelConfig


def load(config: ModelConfig, folder: Path, tokenizer: bool) -> Glm4MoeForCausalLM:
    """A random checkpoint, written and then loaded by transformers, in float32."""
    write_checkpoint(folder, config, seed=SEED, tokenizer=tokenizer)
    return Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: Glm4MoeForCausalLM, ids: list[int], count: int) -> tuple[np.ndarray, float]:
    """`count` greedy tokens, and how close the second best ever came to the best."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    tokens = out.sequences[0, len(ids) :].numpy().astype(np.int32)
    return tokens, float((best[:, 0] - best[:, 1]).min())


def parity_golden(config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """Logits of one prompt."""
    model = load(config, folder, tokenizer=False)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt_ids(config)).long()[None]).logits[0]
    return {"logits": logits.numpy()}


def served_golden(folder: Path) -> dict[str, np.ndarray]:
    """Greedy continuations of the prompts that tests ask of a server."""
    config = default_config()
    model = load(config, folder, tokenizer=True)
    results = [greedy(model, ids, SERVED_TOKENS) for ids in served_prompts(config)]
    print(f"served: closest call {min(gap for _, gap in results):.1e}")
    return {"greedy": np.stack([tokens for tokens, _ in results])}


def main() -> None:
    """Write every golden beside this file."""
    makers = {name: partial(parity_golden, config) for name, config in CASES.items()}
    for name, make in (makers | {"served": served_golden}).items():
        with tempfile.TemporaryDirectory() as folder:
            np.savez_compressed(GOLDENS / f"{name}.npz", **make(Path(folder)))
        print(f"wrote {name}.npz")


if __name__ == "__main__":
    main()
