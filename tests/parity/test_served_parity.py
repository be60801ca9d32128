"""What transformers saves, our command lines convert and serve, token for token."""

from __future__ import annotations

import pytest

from cases import served_prompts
from clients import NEW_TOKENS, ask_all
from glmjax.bench.synthetic import default_config
from glmjax.text.tokenizer import Tokenizer
from torch_models import greedy, random_model, save

pytestmark = pytest.mark.parity


def test_a_saved_checkpoint_is_served_token_for_token(tmp_path, run_command, start_server):
    config = default_config()
    model = random_model(config, seed=3)
    save(model, config, tmp_path / "hf")
    done = run_command("convert/hf_to_orbax.py", tmp_path / "hf", tmp_path / "out", "--verify")
    assert done.returncode == 0, done.stderr
    prompts = served_prompts(config)
    expected = [greedy(model, ids, NEW_TOKENS) for ids in prompts]
    shapes = ("--max-running-requests", "16", "--chunked-prefill-size", "64")
    with start_server("--model", tmp_path / "out", "--mesh", "8", *shapes) as server:
        token_ids, texts = ask_all(server.port, server.grpc_port, prompts)
    assert token_ids == expected
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert texts == [tokenizer.decode(tokens) for tokens in expected]
