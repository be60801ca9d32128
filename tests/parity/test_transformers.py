"""transformers, live: checkpoints that it writes itself, in shapes that no golden holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import CASES
from convert.hf_to_orbax import convert
from glmjax.config import MeshConfig
from glmjax.runner.weights import load
from glmjax.sharding import make_mesh
from harness import Forward
from torch_models import random_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::torch"),
]


VARIANTS = {
    "as tested with goldens": {},
    "half as many kv heads, all dims rotary": {
        "num_key_value_heads": 4,
        "partial_rotary_factor": 1.0,
    },
    "one head a group, two shared experts": {"num_attention_heads": 8, "n_shared_experts": 2},
    "no bias, no qk-norm": {"attention_bias": False, "use_qk_norm": False},
    "all layers sparse": {"first_k_dense_replace": 0},
    "tied embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_random_models(variant, tmp_path):
    config = replace(
        CASES["qk_norm"], **VARIANTS[variant], num_nextn_predict_layers=0, eos_token_ids=(0,)
    )
    model = random_model(config, seed=len(variant))
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    convert(tmp_path / "hf", tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 40, np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    mesh = make_mesh(MeshConfig(tensor=2))
    forward = Forward(*load(tmp_path / "out", mesh)[:1], mesh, load(tmp_path / "out", mesh)[1])
    chunks = [forward.main(ids[a:b])[0] for a, b in ((0, 30), (30, 31), (31, 40))]
    logits = np.concatenate(chunks)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
