"""glm-nano through the interpreted kernels: the same greedy tokens as through plain jax.numpy."""

from __future__ import annotations

import pytest

from glmjax.config import CacheConfig, SchedulerConfig
from glmjax.llm import LLM

PROMPTS = (
    [{"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "system", "content": "The capital of Zorba is Mipol."},
        {"role": "user", "content": "What is the capital of Zorba?"},
    ],
)
PAGES, SEQ_LEN, NEW_TOKENS = 24, 128, 24


def answers(kernels: str, drafts: int) -> list[tuple[int, ...]]:
    scheduler = SchedulerConfig(
        max_running_requests=2,
        chunked_prefill_size=32,
        max_seq_len=SEQ_LEN,
        speculative_num_steps=drafts,
    )
    cache = CacheConfig(page_size=16, num_pages=PAGES)
    with LLM(kernels=kernels, cache=cache, scheduler=scheduler) as llm:
        found = llm.generate(PROMPTS, max_new_tokens=NEW_TOKENS, temperature=0)
    return [completion.token_ids for completion in found]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return answers("ref", 0)


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "drafts"), [("triton", 3), ("mosaic", 0)])
def test_nano_gives_the_same_greedy_tokens_through_kernels(plain, kernels, drafts):
    assert answers(kernels, drafts) == plain
