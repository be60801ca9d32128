"""Writes what transformers computes for the models in tests/cases.py. Needs torch: make goldens.

Each golden holds float32 logits [24, V] of a prompt, and the 24 tokens that greedy decoding adds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Glm4MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES, GOLDENS, SEED, prompt_ids

from glmjax.bench.synthetic import write_checkpoint
from glmjax.config import ModelConfig


def golden(config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """Logits and greedy continuation of a random checkpoint, in float32."""
    write_checkpoint(folder, config, seed=SEED, tokenizer=False)
    model = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompt_ids(config)).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
        greedy = model.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return {"logits": logits.numpy(), "greedy": greedy[0, ids.shape[1] :].numpy().astype(np.int32)}


def main() -> None:
    """Write every golden beside this file."""
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            np.savez_compressed(GOLDENS / f"{name}.npz", **golden(config, Path(folder)))
        print(f"wrote {name}.npz")


if __name__ == "__main__":
    main()
