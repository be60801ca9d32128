"""What is said about FP8's accuracy: divergences as they are defined, and tables of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.bundled import ASSET
from glmjax.train import fp8
from glmjax.train.fp8 import FORMS, REFERENCE, Form, Found, distance, divergence, tables
from glmjax.types import TokenLogprobs


def place(logits: np.ndarray, token: int = 0, most: int = 20) -> TokenLogprobs:
    """As an engine reports a place: the likeliest tokens only."""
    logs = logits - np.logaddexp.reduce(logits)
    order = np.argsort(-logs, kind="stable")[:most]
    return TokenLogprobs(float(logs[token]), tuple((int(i), float(logs[i])) for i in order))


def exact(p: np.ndarray, q: np.ndarray) -> float:
    p_logs, q_logs = (x - np.logaddexp.reduce(x) for x in (p, q))
    return float(np.sum(np.exp(p_logs) * (p_logs - q_logs)))


logits = st.lists(st.floats(-5, 5), min_size=2, max_size=40).map(np.array)


@given(logits, st.integers(0, 99), st.floats(0, 2))
@settings(deadline=None)
def test_a_divergence_is_that_of_all_tokens_or_a_little_less(p, seed, noise):
    q = p + noise * np.random.default_rng(seed).standard_normal(p.shape)
    found = divergence(place(p), place(q))
    assert -1e-6 <= found <= exact(p, q) + 1e-6
    everything = divergence(place(p, most=len(p)), place(q, most=len(q)))
    assert everything == pytest.approx(exact(p, q), abs=1e-5)


def test_distances():
    p, q = np.array([2.0, 1.0, 0.0]), np.array([1.0, 2.0, 0.0])
    reference, form = [place(p), place(p, 1)], [place(p), place(q, 1)]
    found = distance(reference, form)
    assert found.changed == 1
    assert found.worst_kl == pytest.approx(exact(p, q), abs=1e-5)
    assert found.kl == pytest.approx(exact(p, q) / 2, abs=1e-5)
    assert found.logprob == pytest.approx(0.5)


def test_tables():
    """A form's figures stand in its own row and column."""
    rows = [{"task": "add", "problems": 9, "right": 8}, {"task": "copy", "problems": 9, "right": 1}]
    worse = [row | {"right": row["right"] - 1} for row in rows]
    p, q = place(np.array([2.0, 1.0])), place(np.array([1.0, 2.0]))
    found = {REFERENCE: Found(rows, 10, 7, [p, p]), "FP8 KV": Found(worse, 0, 0, [p, q])}
    forms, tasks = tables(found)
    assert forms.rows[0] == (REFERENCE, 9, 0, 0.0, 0.0, 0.0, 0.7)
    assert forms.rows[1][:3] == ("FP8 KV", 7, 1)
    assert forms.rows[1][-1] is None
    assert "Right of 18 held-out problems" in forms.note
    assert tasks.rows == [("add", 8, 7), ("copy", 1, 0)]


def test_forms_differ_in_what_they_are_named_after():
    assert FORMS[REFERENCE] == Form()
    assert {name: form.quantize for name, form in FORMS.items() if "weights" in name} == {
        "FP8 weights": "fp8",
        "FP8 weights and KV": "fp8",
    }
    assert {name for name, form in FORMS.items() if form.kv_dtype == "fp8_e4m3"} == {
        "FP8 KV",
        "FP8 weights and KV",
    }


def test_a_checkpoint_that_is_not_there(capsys, tmp_path):
    assert fp8.main(["--source", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("glmjax.train.fp8: ")


@pytest.mark.slow
def test_fp8_costs_glm_nano_little(monkeypatch):
    """Two forms on few problems: near each other, and not the same."""
    monkeypatch.setattr(fp8, "FORMS", {name: FORMS[name] for name in (REFERENCE, "FP8 weights")})
    found = fp8.run_all(ASSET, problems=4, chats=20, seed=0)
    far = distance(found[REFERENCE].places, found["FP8 weights"].places)
    assert 0 < far.kl < 0.05
    assert far.changed < 0.05 * len(found[REFERENCE].places)
