"""All chains of drafts at once are those that serving makes one by one; and how they count."""

from __future__ import annotations

import numpy as np
import pytest

from cases import CASES, prompt_ids
from glmjax.config import MeshConfig
from glmjax.sharding import make_mesh
from glmjax.train import drafting
from glmjax.train.drafting import Acceptance, Drafter
from harness import Forward

CONFIG = CASES["qk_norm"]
IDS = prompt_ids(CONFIG)
STEPS = 3


@pytest.fixture(scope="module")
def model(random_params):
    """Mesh and parameters of a random model."""
    mesh = make_mesh(MeshConfig())
    params = random_params(CONFIG, mesh)
    return mesh, params["model"], params["mtp"]


class OneByOne:
    """Drafts as serving makes them: over pages, each chain behind the pairs that lead to it."""

    def __init__(self, mesh, params, mtp, ids: np.ndarray):
        self.forward, self.following = Forward(CONFIG, mesh, params, mtp), ids[1:]
        self.hidden = self.forward.main(ids)[1]
        self.empty = self.forward.kv

    def restart(self) -> None:
        """Forget all pairs of next token and state."""
        self.forward.kv, self.forward.lens["mtp"] = self.empty, 0

    def chain(self, pairs: slice) -> list[int]:
        """Takes the next pairs, and drafts behind the last one."""
        logits, states = self.forward.draft(self.following[pairs], self.hidden[pairs])
        before, length = self.forward.kv, self.forward.lens["mtp"]
        found = [int(logits[-1].argmax())]
        while len(found) < STEPS:
            logits, states = self.forward.draft(np.int32(found[-1:]), states[-1:])
            found.append(int(logits[-1].argmax()))
        self.forward.kv, self.forward.lens["mtp"] = before, length
        return found


@pytest.fixture(scope="module")
def serving(model) -> OneByOne:
    return OneByOne(*model, IDS)


@pytest.fixture(scope="module")
def drafts(model) -> np.ndarray:
    """Of the prompt, whose last token has no next one and hence no chain."""
    mesh, params, mtp = model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "TEXT_TOKENS", 32)
        return Drafter(CONFIG, params, mtp, mesh, STEPS).drafts(IDS.tolist())[:-1]


def test_all_chains_at_once_are_those_of_serving(serving, drafts):
    assert drafts.shape == (len(IDS) - 1, STEPS)
    assert len(np.unique(drafts)) > len(IDS)
    serving.restart()
    assert [serving.chain(slice(at, at + 1)) for at in range(len(IDS) - 1)] == drafts.tolist()


def test_a_chain_behind_one_chunk_is_the_same(serving, drafts):
    serving.restart()
    assert serving.chain(slice(17)) == drafts[16].tolist()


def test_a_text_that_is_too_long_is_refused(model):
    mesh, params, mtp = model
    with pytest.raises(ValueError, match="513 tokens, expected at most 512"):
        Drafter(CONFIG, params, mtp, mesh, STEPS).drafts([1] * 513)


TEXT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
WRONG = -1


def accept(*texts: tuple[int, list[list[int]]]) -> Acceptance:
    """Texts of tokens 10, 11, ..., each the length of its prompt and its drafts."""
    total = Acceptance()
    for prompt, drafts in texts:
        total.add(prompt, TEXT[: len(drafts)], np.array(drafts))
    return total


def right(tokens: int) -> list[list[int]]:
    """Drafts that are all right, also beyond the end of the text."""
    return [[at + 12, at + 13, at + 14] for at in range(tokens)]


def test_all_accepted():
    """Token 12 is known; 13 14 15 and 16 of the target's own, then 17 18 19 and the end."""
    assert accept((2, right(10))) == Acceptance(2, 7, [2, 2, 2])


def test_none_accepted():
    """13 to 19 cost a verification each, whatever comes behind a first draft that is wrong."""
    drafts = [[WRONG, at + 13, at + 14] for at in range(10)]
    assert accept((2, drafts)) == Acceptance(7, 7, [0, 0, 0])


def test_accepted_then_wrong():
    """13 and the target's own 14; 15 16 and 17; 18; 19."""
    drafts = right(10)
    drafts[1] = [13, WRONG, 15]
    drafts[3] = [15, 16, WRONG]
    drafts[6] = [WRONG, 19, 20]
    drafts[7] = [19, WRONG, WRONG]
    assert accept((2, drafts)) == Acceptance(4, 7, [3, 1, 0])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (3, Acceptance(0, 0, [0, 0, 0])),
        (4, Acceptance(1, 1, [1, 0, 0])),
        (5, Acceptance(1, 2, [1, 1, 0])),
        (6, Acceptance(1, 3, [1, 1, 1])),
        (7, Acceptance(1, 4, [1, 1, 1])),
        (8, Acceptance(2, 5, [2, 1, 1])),
    ],
)
def test_a_text_ends_inside_a_chain(tokens: int, expected: Acceptance):
    """What is drafted beyond the end counts for nothing."""
    assert accept((2, right(tokens))) == expected


def test_texts_add_up_to_a_report():
    total = accept((2, right(10)), (1, [[WRONG] * 3 for _ in range(5)]))
    assert total == Acceptance(5, 10, [2, 2, 2])
    assert total.report().splitlines() == [
        "verifications: 5",
        "tokens a verification: 2.00",
        "accepted, by step of the chain: 0.40, 0.40, 0.40",
    ]


def test_a_model_that_is_not_there(run_command, tmp_path):
    done = run_command("-m", "glmjax.train.drafting", "--model", tmp_path / "none")
    assert done.returncode == 1
    assert "glmjax.train.drafting: " in done.stderr
    assert "none is not a folder" in done.stderr
    assert "Traceback" not in done.stderr
