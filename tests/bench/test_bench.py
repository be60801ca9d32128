"""The measures, end to end on a fake runner; figures of real ones come from `make bench`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from glmjax.bench import chat, host, scheduling
from glmjax.bench.__main__ import MEASURES, main
from glmjax.bench.engines import Engines
from glmjax.bench.streams import answer, in_turn, since
from glmjax.bundled import ASSET
from glmjax.config import CacheConfig, MeshConfig
from glmjax.engine import Engine
from glmjax.runner.fake import FakeRunner
from glmjax.scheduler.limits import make_limits
from glmjax.server.served import ServedModel
from glmjax.tables import Table
from glmjax.types import EngineCounters, Request, SamplingParams

ROW = re.compile(r"^\| .+ \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def engines():
    served = ServedModel.load(ASSET)

    def make(config):
        limits = make_limits(served.config, MeshConfig(), CacheConfig(num_pages=2000), config)
        return Engine(FakeRunner(limits), config, served.eos_token_ids), served

    return Engines(make)


def rows_of(table: Table) -> list[dict]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_runs_and_gives_whole_tables(engines, name):
    measure = MEASURES[name]
    for table in measure.run(engines, measure.quick):
        assert rows_of(table)
        assert len(ROW.findall(table.text())) == len(table.rows) + 2


# What figures mean, by what is known without a device


def test_host_times_only_steps_in_which_all_decode():
    load, steps = host.Load(8, 100, 1000), 30
    engine, runner = host.decoding(load, steps)
    before = engine.counters()
    assert engine.load().running == 8
    assert engine.load().cached_tokens == pytest.approx(1000, abs=host.PAGE_SIZE)
    times = host.time_steps(engine, runner, steps)
    done = since(engine.counters(), before)
    assert (done.steps, done.computed_tokens) == (steps, 0)
    # 1, 2 and 3 drafts accepted in turn, as far as they were verified
    assert 2 * 8 * steps <= done.generated_tokens <= 3.1 * 8 * steps
    assert done.drafted[2] > 0
    assert engine.load().running == 8
    assert times.step.shape == (steps,)
    assert np.all(times.pack > 0)
    assert np.all(times.pack < times.step)


def test_prefix_computes_the_common_part_once(engines):
    measure = MEASURES["prefix"]
    [table] = measure.run(engines, measure.quick)
    without, cached = (row["computed tokens"] for row in rows_of(table))
    assert without == 4 * 110
    # 110 whole; of the others all but the whole pages of the common 100
    assert cached == 110 + 3 * (110 - 96)


def test_a_chat_breaks_where_the_first_thought_was(engines):
    sizes = chat.Sizes(turns=3, new_tokens=8)
    by_request, whole = (rows_of(table) for table in chat.measure(engines, sizes))
    questions = [row for row in by_request if row["last message"] == "user"]
    assert len(questions) == 3
    assert questions[0]["first thought at"] is None
    for row in questions[1:]:
        assert row["as before"] >= row["first thought at"] - 1
        assert row["cached"] <= row["as before"] < row["prompt tokens"]
        assert row["cached"] > row["first thought at"] - 2 * 16
    assert [row["chat"] for row in whole] == ["thinking", "not thinking"]
    assert whole[0]["cached"] == sum(row["cached"] for row in by_request)


@pytest.mark.parametrize(("streams", "drafts"), [(1, 3), (4, 0)])
def test_arrivals_are_computed_beside_streams(engines, streams, drafts):
    engine = engines.engine(speculative_num_steps=drafts)
    sizes = scheduling.Sizes(streams=streams, arrivals=2, prompt=600)
    watch = scheduling.run(engine, sizes, sizes.arrivals)
    assert len(watch.waits_s) == 2
    assert 1200 / 256 <= watch.chunks <= watch.steps
    assert watch.mixed == watch.chunks
    assert max(steps for steps, _ in watch.gaps) == 1
    assert all(0 < seconds < 10 for _, seconds in watch.gaps)
    assert not engine.has_work()


def test_answer_keeps_to_as_many_at_once(engines):
    alive, most = set(), []

    class Watched(Engine):
        def add(self, request):
            alive.add(request.id)
            most.append(len(alive))
            super().add(request)

        def step(self):
            outputs = super().step()
            alive.difference_update(o.request_id for o in outputs if o.finish_reason)
            return outputs

    asked = [Request(str(i), (5, i), SamplingParams(4)) for i in range(1, 7)]
    outcome = answer(Watched(FakeRunner(engines.engine().limits)), asked, at_once=2)
    assert max(most) == 2
    assert [len(tokens) for tokens in outcome.tokens.values()] == [4] * 6
    assert outcome.done.generated_tokens == 24


def test_cases_take_turns_after_a_round_that_does_not_count(capsys):
    ran = []
    cases = {name: lambda name=name: ran.append(name) or len(ran) for name in "ab"}
    assert in_turn(cases, 2, "x") == {"a": [3, 5], "b": [4, 6]}
    assert ran == list("ababab")
    assert "x: 3 of 3" in capsys.readouterr().err


def test_counters_are_subtracted_place_by_place():
    before, now = EngineCounters(steps=2, drafted=(3, 1)), EngineCounters(steps=5, drafted=(4, 4))
    assert since(now, before) == EngineCounters(steps=3, drafted=(1, 3))
    assert since(now, EngineCounters()).drafted == (4, 4)


# The report


def test_a_table_is_aligned_markdown():
    table = Table("T", ("what", "n", "x"), [("a", 12345, 0.5), ("bcdef", 1, 1234.5)], "A note.")
    assert table.text().splitlines() == [
        "### T",
        "",
        "A note.",
        "",
        "| what  |      n |     x |",
        "| ----- | -----: | ----: |",
        "| a     | 12,345 | 0.500 |",
        "| bcdef |      1 | 1,234 |",
    ]


def test_host_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["host", "--quick", "--json", str(file)]) == 0
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    for name in ("date", "CPU", "memory", "load average", "versions", "model", "devices"):
        assert f"{name}: {figures['machine'][name]}" in printed
    assert figures["machine"]["model"] == "glm-nano, bfloat16"
    [table] = figures["measures"]["host"]
    assert f"### {table['title']}" in printed
    assert len(table["rows"]) == 2
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["prefix", "--model", str(tmp_path / "gone")]) == 1
    assert f"glmjax.bench: {tmp_path / 'gone'}" in capsys.readouterr().err


def test_an_unknown_measure_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["host", "speed"])
    assert stopped.value.code == 2
    assert "unknown measure speed; expected some of host, tokens, prefix" in capsys.readouterr().err


@pytest.mark.slow
def test_prefix_as_a_process_with_the_real_model(run_command):
    done = run_command("-m", "glmjax.bench", "prefix", "--quick", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| without +\| +440 \|", done.stdout)
    assert re.search(r"\| with +\| +152 \|", done.stdout)
