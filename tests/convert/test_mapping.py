"""The table covers every element of every leaf of every known release, once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import jax
import numpy as np
import pytest
from hf_checkpoints import TINY, draw

from convert.mapping import is_ignored, places
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import path_name, specs_of
from glmjax.releases import KNOWN_MODELS

MODELS = {
    **{name: config for name, config in KNOWN_MODELS.items() if not name.endswith("FP8")},
    "tiny": TINY,
    "tied, no bias": replace(TINY, tie_word_embeddings=True, attention_bias=False),
}


def flat_specs(config):
    tree = specs_of(Decoder(config)) | {"mtp": specs_of(MTP(config))}
    return {path_name(path): spec for path, spec in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_places_tile_every_leaf(config):
    specs = flat_specs(config)
    by_leaf = defaultdict(list)
    for place in places(config, specs):
        by_leaf[place.leaf].append(place.index)
    assert by_leaf.keys() == specs.keys()
    for leaf, indices in by_leaf.items():
        assert_tiled(specs[leaf].shape, indices, leaf)


def assert_tiled(shape, indices, leaf):
    """Only leading axes are indexed: count how often each element of those is taken."""
    axes = max(map(len, indices))
    taken = np.zeros(shape[:axes], np.int32)
    for index in indices:
        taken[index] += 1
    assert (taken == 1).all(), leaf


def test_places_name_each_tensor_of_a_checkpoint_once():
    names = [place.tensor for place in places(TINY, flat_specs(TINY))]
    assert sorted(names) == sorted(draw(TINY))


def test_tied_head_reads_the_embedding():
    config = replace(TINY, tie_word_embeddings=True)
    sources = {place.leaf: place.tensor for place in places(config, flat_specs(config))}
    assert sources["lm_head"] == sources["embed_tokens"] == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "config", "ignored"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", TINY, True),
        ("model.layers.3.embed_tokens.weight", TINY, True),
        ("model.layers.3.shared_head.head.weight", TINY, True),
        ("model.layers.3.shared_head.head.weight_scale", TINY, True),
        ("model.layers.2.embed_tokens.weight", TINY, False),
        ("model.layers.3.embed_tokens.weight", replace(TINY, num_nextn_predict_layers=0), False),
        ("lm_head.weight", TINY, False),
        ("lm_head.weight", replace(TINY, tie_word_embeddings=True), True),
        ("model.layers.0.self_attn.o_proj.bias", TINY, False),
    ],
)
def test_only_known_copies_are_ignored(name, config, ignored):
    assert is_ignored(config, name) is ignored
