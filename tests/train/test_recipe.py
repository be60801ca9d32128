"""The recipe that ships is a GLM-4.5 in small; a recipe with a mistake is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.train.recipe import Recipe, read_recipe
from glmjax.train.step import param_specs

NANO = Path(__file__).parents[2] / "recipes" / "nano.toml"
TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="module")
def nano() -> Recipe:
    return read_recipe(NANO)


def test_nano_is_every_part_of_a_glm(nano: Recipe):
    model = nano.model
    assert 0 < model.first_k_dense_replace < model.num_hidden_layers
    assert model.n_shared_experts == 1
    assert model.num_experts_per_tok < model.n_routed_experts
    assert 1 < model.num_key_value_heads < model.num_attention_heads
    assert 0 < model.rotary_dim < model.head_dim
    assert model.use_qk_norm
    assert model.attention_bias
    assert model.num_nextn_predict_layers == 1
    assert model.head_dim >= 32
    assert model.max_position_embeddings >= 2048
    assert all(stage.mtp_weight > 0 for stage in nano.stages)


def test_nano_is_small_and_divides_over_eight_devices(nano: Recipe):
    parameters = sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(nano.model)))
    assert 3e6 < parameters < 12e6
    MeshConfig.parse("8").check(nano.model)


def test_nano_learns_long_texts_and_ends_with_settled_routers(nano: Recipe):
    longest = max(nano.stages, key=lambda stage: stage.seq_len)
    assert longest.joined
    assert longest.seq_len >= 2048
    assert nano.stages[-1].bias_rate == 0


def test_stages_at_their_borders():
    recipe = read_recipe(TINY)
    first, second = recipe.stages
    assert recipe.steps == 6
    assert recipe.tokens == 6 * 4 * 128
    assert [recipe.stage_at(step) for step in range(6)] == [*[first] * 4, *[second] * 2]
    with pytest.raises(ValueError, match="1 beyond the last stage"):
        recipe.stage_at(6)


def test_what_is_missing_has_a_default():
    recipe = read_recipe(TINY)
    assert (recipe.stages[0].joined, recipe.stages[1].joined) == (False, True)
    assert recipe.stages[0].mtp_weight == recipe.stages[1].mtp_weight == 0.3
    assert recipe.optimizer.momentum == 0.95


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[model", "cannot be read as a TOML recipe: .*line 8"),
        ('name = "tiny"\n', "", "recipe: .*missing .*'name'"),
        ("seed = 3", "seeds = 3", "recipe is .*'seeds'.*expected a table of name, model"),
        ("hidden_size = 32", "hidden = 32", "model is .*'hidden'.*expected a table of vocab_size"),
        ("warmup_steps", "warmup", "optimizer is .*'warmup'.*expected a table of learning_rate"),
        ("conversations", "chats", "tokenizer is .*'chats'.*expected a table of vocab_size"),
        ("joined", "joint", "stages is .*'joint'.*expected a table of steps"),
        ("steps = 2\n", "", "stages: .*missing .*'steps'"),
        ("[tokenizer]\nvocab_size = 400", "[tokenizer]\nvocab_size = 512", "400 and .*512 differ"),
        ("rows = 4", "rows = 3", r"rows \[3\] are no multiples of devices 2"),
        ("num_attention_heads = 4", "num_attention_heads = 3", "num_attention_heads 3 is not a"),
        ("hidden_size = 32", "hidden_size = 0", "hidden_size is 0, expected a positive number"),
        ("[[stages]]\nsteps = 4", "[[extra]]\nsteps = 4", "recipe is .*'extra'"),
        ("devices = 2", "devices = 0", "devices is 0, expected 1 or more"),
        ("devices = 2", 'devices = "2"', "recipe.devices is '2', expected int"),
        ("rows = 4", 'rows = "4"', "stages.rows is '4', expected int"),
        ("steps = 2\n", "steps = 0\n", r"stages\[1\].steps is 0, expected 1 or more"),
        ("hidden_size = 32", 'hidden_size = "32"', "model.hidden_size is '32', expected int"),
        ("num_attention_heads = 4", "num_attention_heads = 4.0", "heads is 4.0, expected int"),
        (
            "learning_rate = 2e-2",
            'learning_rate = "2e-2"',
            "learning_rate is '2e-2', expected float",
        ),
        ("use_qk_norm = true", "use_qk_norm = 1", "use_qk_norm is 1, expected bool"),
        ("checkpoint_every_steps = 3", "checkpoint_every_steps = 0", "steps is 0, expected 1"),
        ('name = "tiny"', 'name = "../x"', r"name is '\.\./x', expected letters"),
        ('name = "tiny"', 'name = "checkpoints"', "'checkpoints', which the run's folder has"),
        ("joined = true", "tasks = {sing = 1.0}", r"stages\.tasks names \['sing'\], .*'add'"),
        ("warmup_steps = 1", "restarts = [{at = 3}]", r"restarts is .*'at'.* table of step"),
        ("[tokenizer]", "[tokenizer.more]", "tokenizer is .*'more'.*expected a table"),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path, old, new, message):
    file = tmp_path / "bad.toml"
    text = TINY.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ConfigError, match=rf"(?s)bad\.toml.*{message}"):
        read_recipe(file)


@pytest.mark.parametrize("name", ["model", "tokenizer", "optimizer", "stages"])
def test_a_part_of_the_wrong_type_is_refused(tmp_path, name):
    file = tmp_path / "bad.toml"
    file.write_text(f'name = "x"\n{name} = "large"\n', "utf-8")
    with pytest.raises(ConfigError, match=rf"bad\.toml: {name} is .*, expected a table of"):
        read_recipe(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read as a TOML recipe: .*No such"):
        read_recipe(tmp_path / "none.toml")
