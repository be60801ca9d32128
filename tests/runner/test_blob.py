"""What the host packs, the device unpacks."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glmjax.runner.blob import pack, unpack
from glmjax.types import Bucket, Limits, Row, SamplingParams, StepPlan

LIMITS = Limits(2, 5, 9, 4, 32, (Bucket(3, 3, 1),), (Bucket(3, 20, 20),))

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 10, width=32),
    top_k=st.sampled_from([-1, 1, 2**31 - 1]),
    top_p=st.floats(0.0625, 1, width=32),
    seed=st.integers(0, 2**32 - 1),
)


@st.composite
def rows(draw, decode: bool):
    tokens = None if decode else draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
    pages = draw(st.lists(st.integers(1, 8), max_size=1 if decode else 8))
    return Row(
        slot=draw(st.integers(0, 4)),
        start=-1 if decode else draw(st.integers(0, 9)),
        token_ids=None if decode else np.array(tokens, np.int32),
        q_len=1 if decode else len(tokens),
        page_index=draw(st.integers(0, 7)),
        new_pages=tuple(pages),
        sample=draw(st.booleans()),
        sampling=draw(sampling),
    )


@st.composite
def plans(draw):
    decode = draw(st.booleans())
    groups = st.lists(rows(decode), max_size=3).map(tuple)
    bucket = (LIMITS.decode_buckets if decode else LIMITS.prefill_buckets)[0]
    return StepPlan(bucket, (draw(groups), draw(groups)))


@given(plans())
def test_every_field_arrives(plan):
    blob = pack(plan, LIMITS)
    for group, expected in enumerate(plan.groups):
        fields = jax.tree.map(np.asarray, unpack(blob[group], plan.bucket, LIMITS))
        first = 0
        for r, row in enumerate(expected):
            assert fields.slots[r] == row.slot
            assert fields.starts[r] == row.start
            assert fields.q_lens[r] == row.q_len
            assert fields.sample[r] == row.sample
            assert fields.from_device[r] == (row.token_ids is None)
            assert fields.page_index[r] == row.page_index
            assert tuple(fields.new_pages[r, : fields.page_count[r]]) == row.new_pages
            assert fields.temperature[r] == np.float32(row.sampling.temperature)
            assert fields.top_p[r] == np.float32(row.sampling.top_p)
            assert fields.top_k[r] == row.sampling.top_k
            assert fields.seeds[r].view(np.uint32) == row.sampling.seed
            if row.token_ids is not None:
                np.testing.assert_array_equal(
                    fields.token_ids[first : first + row.q_len], row.token_ids
                )
            first += row.q_len
        padding = slice(len(expected), None)
        assert (fields.slots[padding] == LIMITS.slots).all()
        assert (fields.q_lens[padding] == 0).all()
        assert (fields.sample[padding] == 0).all()
