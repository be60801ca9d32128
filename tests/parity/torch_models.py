"""Checkpoints that transformers makes and writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from glmjax.bench.synthetic import MTP_FILE, hf_config, write_checkpoint
from glmjax.config import ModelConfig


def random_model(config: ModelConfig, seed: int):
    """A transformers model with weights of order one, a bias near 7 and norms near 1."""
    torch.manual_seed(seed)
    raw = hf_config(config, "float32", config.eos_token_ids)
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**raw)).eval()
    for name, tensor in model.state_dict().items():
        centre = 7.0 if name.endswith("correction_bias") else 1.0 if "norm" in name else 0.0
        matrix = tensor.ndim > 1 and "embed_tokens" not in name
        scale = tensor.shape[-1] ** -0.5 if matrix else 0.1 if centre else 1.0
        tensor.copy_(centre + scale * torch.randn_like(tensor))
    return model


def save(model, config: ModelConfig, folder: Path) -> None:
    """As releases are: several shards by transformers, the MTP block in a file beside them."""
    model.save_pretrained(folder, max_shard_size="300KB")
    extra = folder.with_name("extra")
    write_checkpoint(extra, config)
    (folder / MTP_FILE).write_bytes((extra / MTP_FILE).read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((extra / name).read_bytes())
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    mtp = json.loads((extra / file.name).read_text())["weight_map"]
    index["weight_map"] |= {k: v for k, v in mtp.items() if v == MTP_FILE}
    file.write_text(json.dumps(index))
    assert len(set(index["weight_map"].values())) > 3


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The tokens that transformers adds to a prompt."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()
