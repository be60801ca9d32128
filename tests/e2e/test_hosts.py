"""One model over several processes, as it is over several machines: the same answers, one end."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from processes import START_TIMEOUT_S, Server

SMALL = ("--chunked-prefill-size", "16", "--max-seq-len", "256")
PLAIN = (*SMALL, "--speculative-num-steps", "0")
ONE, TWO = (("--max-running-requests", str(n)) for n in (1, 2))
LONG = [(7 * i) % 500 for i in range(100)]  # beyond what a step's blob has room for, once cached
END_S = 40  # for a process to end, which on a busy machine takes seconds


def params(count: int, temperature: float = 0.0, **more) -> dict:
    return {"max_new_tokens": count, "temperature": temperature, "ignore_eos": True} | more


PENALTIES = {"presence_penalty": 0.7, "repetition_penalty": 1.3, "logit_bias": {"11": 2.0}}
ASKED = [
    {"input_ids": [5, 6, 7, 8], "sampling_params": params(12), "top_logprobs_num": 3},
    {"input_ids": LONG[:30], "sampling_params": params(12, 1.0, seed=7), "logprob_start_len": 0},
    {"input_ids": LONG, "sampling_params": params(12, 1.0, seed=8)},
    {"input_ids": [*LONG, 1], "sampling_params": params(12)},  # finds the prefix of the last
    {"input_ids": [9, 9, 9], "sampling_params": params(12, 1.0, seed=9, **PENALTIES)},
    {"input_ids": [4, 2], "sampling_params": params(12, 1.0, seed=3, regex="[ab]{4}c+")},
]


def answers(server: Server) -> list[dict]:
    """What is asked one after another, and then all at once."""

    def ask(body: dict) -> dict:
        body = body | {"return_logprob": True}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=100)
        assert answer.status_code == 200, answer.text
        return answer.json()

    alone = [ask(body) for body in ASKED]
    found: list[dict] = [{}] * len(ASKED)

    def keep(i: int) -> None:
        found[i] = ask(ASKED[i])

    threads = [threading.Thread(target=keep, args=(i,)) for i in range(len(ASKED))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return alone + found


def check_same(found: list[dict], expected: list[dict]) -> None:
    assert [a["output_ids"] for a in found] == [a["output_ids"] for a in expected]
    for one, other in zip(found, expected, strict=True):
        for kind in ("output_token_logprobs", "input_token_logprobs"):
            a, b = ([place[0] for place in x["meta_info"].get(kind) or []] for x in (one, other))
            np.testing.assert_allclose(
                np.array(a, float), np.array(b, float), rtol=1e-3, atol=1e-3, equal_nan=True
            )
    assert found[3]["meta_info"]["cached_tokens"] >= 80
    assert len({tuple(a["output_ids"]) for a in found}) > 4


@contextmanager
def asking(server: Server):
    """A long request under way; gives where its answer will be."""
    began, answer = threading.Event(), {"text": ""}

    def read() -> None:
        body = {"input_ids": [5, 6, 7], "sampling_params": params(200), "stream": True}
        try:
            with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=100) as stream:
                for line in stream.iter_lines():
                    answer["text"] += line
                    began.set()
        except httpx.TransportError as error:
            answer["text"] += str(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(60)
    try:
        yield answer
    finally:
        reader.join(END_S)
        assert not reader.is_alive()


def ends(servers: list[Server]) -> list[int]:
    deadline = time.monotonic() + END_S
    return [s.process.wait(max(deadline - time.monotonic(), 1)) for s in servers]


def wait_for(server: Server, words: str) -> None:
    """Until its log has them."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while words not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def errors(server: Server) -> list[str]:
    """Lines of a log that are for a person to act on."""
    lines = server.log.read_text().splitlines()
    return [line for line in lines if " ERROR " in line or line.startswith("serve.py:")]


def check_one_line(server: Server, gone: int) -> None:
    """One line names the host that is gone, and nothing else cries."""
    (line,) = errors(server)
    assert f"host {gone} at 127.0.0.1" in line
    assert "start all hosts again" in line
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Check failure" not in log


@pytest.fixture(scope="module")
def expected(start_server, converted) -> list[dict]:
    """The answers of one process with one device."""
    with start_server("--model", converted, *PLAIN, *ONE) as server:
        return answers(server)


@pytest.mark.slow
def test_a_tensor_group_over_two_hosts_and_a_follower_that_is_told_to_stop(
    start_hosts, converted, expected
):
    with start_hosts(2, "--model", converted, "--mesh", "2", *PLAIN, *ONE) as servers:
        check_same(answers(servers[0]), expected)
        with asking(servers[0]) as answer:
            servers[1].process.send_signal(signal.SIGTERM)
        assert '"finish_reason":{"type":"length"' in answer["text"]
        assert ends(servers) == [0, 0]
        assert not errors(servers[0]) + errors(servers[1])
        assert "host 1 was told to stop" in servers[0].log.read_text()


@pytest.mark.slow
def test_all_hosts_that_are_told_to_stop_at_once(start_hosts, converted):
    """As an orchestrator does it: a request that runs is finished all the same."""
    with start_hosts(2, "--model", converted, "--mesh", "2", *PLAIN, *ONE) as servers:
        with asking(servers[0]) as answer:
            for server in servers[::-1]:
                server.process.send_signal(signal.SIGTERM)
            wait_for(servers[0], "draining: 1 requests")
            servers[1].process.send_signal(signal.SIGINT)
        assert '"finish_reason":{"type":"length"' in answer["text"]
        assert ends(servers) == [0, 0]
        assert not errors(servers[0]) + errors(servers[1])


@pytest.mark.parametrize("told", [0, 1])
def test_a_host_that_is_told_to_stop_before_the_service_is_ready(start_hosts, converted, told):
    with start_hosts(2, "--model", converted, "--mesh", "2", ready=False) as servers:
        wait_for(servers[told], "the devices of 2 hosts are connected")
        servers[told].process.send_signal(signal.SIGTERM)
        assert ends(servers) == [0, 0]
        for server in servers:
            line = f"INFO host {told} was told to stop before the service was ready"
            assert line in server.log.read_text()
            assert not errors(server)


def test_data_groups_on_two_hosts_and_a_follower_that_dies(start_hosts, converted, expected):
    with start_hosts(2, "--model", converted, "--mesh", "2x1", *PLAIN, *TWO) as servers:
        check_same(answers(servers[0]), expected)
        with asking(servers[0]) as answer:
            servers[1].process.kill()
        assert "host 1 at 127.0.0.1 is gone" in answer["text"]
        assert ends(servers[:1]) == [1]
        check_one_line(servers[0], 1)


@pytest.mark.slow
def test_a_leader_that_dies(start_hosts, converted):
    with start_hosts(2, "--model", converted, "--mesh", "2", *PLAIN, *ONE) as servers:
        with asking(servers[0]):
            servers[0].process.kill()
        assert ends(servers[1:]) == [1]
        check_one_line(servers[1], 0)


def test_hosts_that_were_started_otherwise_are_refused(start_hosts, converted):
    own = (("--max-running-requests", "2"), ("--max-running-requests", "4"))
    options = ("--model", converted, "--mesh", "2")
    with start_hosts(2, *options, own=own, ready=False) as servers:
        assert ends(servers) == [1, 1]
        for server in servers:
            (line,) = errors(server)
            assert line.startswith("serve.py:")
            assert "--max-running-requests is 4 on host 1 and 2 on host 0" in line


def test_an_index_is_needed(run_command, converted):
    done = run_command("serve.py", "--model", converted, "--mesh", "2", "--hosts", "2")
    assert done.returncode == 1
    assert "needs its --host-index, from 0 to 1" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("mesh", "hosts"), [("2x1", 2), ("2x2", 4)])
def test_drafts_over_hosts_and_a_leader_that_is_told_to_stop(
    start_hosts, converted, expected, mesh, hosts
):
    drafts = ("--speculative-num-steps", "2")
    with start_hosts(hosts, "--model", converted, "--mesh", mesh, *SMALL, *TWO, *drafts) as servers:
        check_same(answers(servers[0]), expected)
        with asking(servers[0]) as answer:
            servers[0].process.send_signal(signal.SIGTERM)
        assert '"finish_reason":{"type":"length"' in answer["text"]
        assert ends(servers) == [0] * hosts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_follower_that_hangs_is_noticed(start_hosts, converted):
    with start_hosts(3, "--model", converted, "--mesh", "3x1", *PLAIN, *ONE) as servers:
        with asking(servers[0]) as answer:
            servers[2].process.send_signal(signal.SIGSTOP)
        assert "host 2 at 127.0.0.1 is gone" in answer["text"]
        assert ends(servers[:2]) == [1, 1]
        for server in servers[:2]:
            check_one_line(server, 2)
            assert "silent for 30 s" in server.log.read_text()
