"""Random traffic for minutes: every output is right, and nothing is left behind.

GLMJAX_SOAK_S: seconds, 120 unless told.
"""

from __future__ import annotations

import gc
import os
import random
import time
import tracemalloc

import pytest
from scheduler.random_traffic import RandomTraffic
from scheduler.traffic import check_idle, make_limits

SECONDS = float(os.environ.get("GLMJAX_SOAK_S", "120"))
SHAPES = [
    make_limits(groups=2, slots=4, pages=20, page_size=4, chunk=16, drafts=3),
    make_limits(groups=1, slots=3, pages=45, page_size=1, chunk=8, drafts=0),
    make_limits(groups=3, slots=2, pages=12, page_size=4, chunk=3, drafts=1),
]
ACTIONS = {
    "add": 300,
    "step": 640,
    "abort": 30,
    "flush": 4,
    "pause": 4,
    "weights": 1,
    "failure": 2,
}
WARM_UP = 4  # rounds after which memory is first measured
GROWTH_BYTES = 1 << 20


def kept(traffic: RandomTraffic) -> dict[str, int]:
    """Sizes of all that an idle scheduler still holds."""
    scheduler = traffic.scheduler
    nodes = [node for group in scheduler._groups for node in group.cache.root.subtree()]
    return {
        "alive": len(scheduler._alive),
        "waiting": len(scheduler._waiting),
        "running": sum(len(group.running) for group in scheduler._groups),
        "in flight": len(scheduler._in_flight) + len(traffic.engine._launched),
        "outputs": len(scheduler._outputs),
        "nodes": max(0, len(nodes) - sum(group.pool.capacity + 1 for group in scheduler._groups)),
    }


def play(traffic: RandomTraffic, actions: int) -> None:
    """A stretch of traffic, until nothing is left of it."""
    for _ in range(actions):
        traffic.act()
    traffic.finish()
    traffic.now += 100  # past every deadline
    traffic.scheduler.expire()
    check_idle(traffic.engine)
    assert set(kept(traffic).values()) == {0}, kept(traffic)
    assert not traffic.scheduler._deadlines
    assert not traffic.lineage.born
    traffic.forget()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("limits", SHAPES, ids=["drafts", "plain", "groups"])
def test_hours_of_traffic_leave_nothing_behind(limits, caplog):
    caplog.set_level("CRITICAL")  # failed steps are logged, and the log would grow
    traffic = RandomTraffic(random.Random(2024), limits, ACTIONS, record=False)
    end_s = time.monotonic() + SECONDS / len(SHAPES)
    rounds, first_bytes, last_bytes = 0, 0, 0
    tracemalloc.start()
    try:
        while time.monotonic() < end_s or rounds <= WARM_UP:
            play(traffic, 400)
            rounds += 1
            gc.collect()
            last_bytes, _ = tracemalloc.get_traced_memory()
            if rounds == WARM_UP:
                first_bytes = last_bytes
    finally:
        tracemalloc.stop()
    assert last_bytes - first_bytes < GROWTH_BYTES
    assert traffic.ended > 50 * rounds
    assert traffic.engine.counters().preemptions > rounds
