"""deploy/ and docs/deploy.md: what can be checked with no cluster, no systemd and no GPU."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from smg.launch_router import parse_router_args

import serve
from convert import hf_to_orbax
from manifests import Document, all_pods, faults

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PARSERS: dict[tuple[str, ...], Any] = {
    ("python", "serve.py"): serve.parser().parse_args,
    ("python", "convert/hf_to_orbax.py"): hf_to_orbax._parser().parse_args,
    ("smg", "launch"): parse_router_args,
}


def load(name: str) -> list[Document]:
    return list(yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text("utf-8")))


def command_lines(text: str) -> list[list[str]]:
    """The words of every line in a ```sh block of a page, lines that end in \\ joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.stem)
def test_kubernetes_documents_fit_the_schemas_the_programs_and_each_other(file):
    assert faults(load(file.stem)) == []


SERVE = "spec/template/spec/containers/0"
LEADER = "spec/leaderWorkerTemplate/leaderTemplate"
# File, which document, where in it, what is put there (None: taken away), what is said of it.
MISTAKES: list[tuple[str, int, str, Any, str]] = [
    # schemas
    ("replicas", 0, "spec/replica", 3, "'replica' was unexpected"),
    ("replicas", 0, "spec/replicas", "three", "'three' is not of type"),
    ("replicas", 0, f"{SERVE}/readynessProbe", {}, "'readynessProbe' was unexpected"),
    ("replicas", 1, "spec/maxUnavailabel", 1, "'maxUnavailabel' was unexpected"),
    ("leader-worker-set", 0, "spec/leaderWorkerTemplate/sise", 2, "'sise' was unexpected"),
    ("leader-worker-set", 0, "spec/startupPolicy", "Ready", "'Ready' is not one of"),
    ("leader-worker-set", 0, f"{LEADER}/spec/volume", [], "'volume' was unexpected"),
    # selectors
    ("replicas", 0, "spec/selector/matchLabels/role", "gateway", "does not select its own"),
    ("replicas", 1, "spec/selector/matchLabels/role", "replicas", "selects no pod"),
    ("replicas", 3, "spec/ingress/0/from/0/podSelector/matchLabels/role", "x", "lets in no pod"),
    ("replicas", 9, "spec/selector/role", "front", "selects no pod"),
    ("leader-worker-set", 1, "spec/selector/role", "lead", "selects no pod"),
    ("leader-worker-set", 2, "spec/podSelector/matchExpressions/1/values", ["x"], "selects no pod"),
    # ports
    ("replicas", 0, f"{SERVE}/livenessProbe/httpGet/port", "https", "no port https"),
    ("replicas", 2, "spec/ports/1/targetPort", "rpc", "no pod has port rpc"),
    ("replicas", 3, "spec/ingress/0/ports/0/port", 30002, "no pod has port 30002"),
    ("leader-worker-set", 0, f"{LEADER}/spec/containers/0/startupProbe/httpGet/port", 1, "port 1"),
    ("leader-worker-set", 0, f"{LEADER}/spec/containers/0/ports/3/containerPort", 1, "listens on"),
    ("replicas", 0, f"{SERVE}/args/4", "--port=30009", "listens on"),
    ("replicas", 7, f"{SERVE}/args/1", "--port=8001", "listens on"),
    ("replicas", 7, f"{SERVE}/args/5", "--service-discovery-port=30003", "has port 30003"),
    ("replicas", 7, f"{SERVE}/args/8", "role=leader", "has port 30001"),
    # grace periods
    ("replicas", 0, "spec/template/spec/terminationGracePeriodSeconds", 60, "killed after 60 s"),
    ("replicas", 7, "spec/template/spec/terminationGracePeriodSeconds", 30, "killed after 30 s"),
    ("leader-worker-set", 0, f"{LEADER}/spec/terminationGracePeriodSeconds", 45, "killed after 45"),
    # what the programs are told
    ("replicas", 0, f"{SERVE}/args/0", "--modle=/models", "does not take"),
    ("replicas", 0, f"{SERVE}/args/2", "--mesh=16", "not 1 x 8 GPUs"),
    ("replicas", 7, f"{SERVE}/args/9", "--policy=fair", "smg does not take"),
    ("leader-worker-set", 0, f"{LEADER}/spec/containers/0/args/3", "--hosts=3", "group has 2"),
    ("leader-worker-set", 0, "spec/leaderWorkerTemplate/size", 3, "--mesh 16 is not 3 x 8"),
    # volumes
    ("replicas", 0, f"{SERVE}/volumeMounts/0/name", "model", "no volume model"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[0]}[{m[1]}] {m[2][-40:]}")
def test_a_mistake_in_a_document_is_found(mistake):
    file, number, path, value, said = mistake
    documents = copy.deepcopy(load(file))  # what YAML repeats is shared
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = documents[number]
    for key in parents:
        place = place[key]
    place[last] = value
    assert any(said in fault for fault in faults(documents)), faults(documents)


def test_hosts_of_a_group_are_started_alike():
    leader, worker = all_pods(load("leader-worker-set"))
    for key in ("image", "command", "args", "env", "resources", "volumeMounts"):
        assert leader.containers[0][key] == worker.containers[0][key]
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    assert probes <= leader.containers[0].keys()
    assert not probes & worker.containers[0].keys()  # only the leader serves HTTP


def unit(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What systemd says of the unit, with this machine's paths in the place of /opt/glmjax."""
    here = {"/opt/glmjax/.venv/bin/python": sys.executable, "/opt/glmjax": str(ROOT)}
    for there, path in here.items():
        text = text.replace(there, path)
    file = tmp_path / "glmjax.service"
    file.write_text(text, "utf-8")
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_finds_mistakes_in_it(tmp_path):
    text = (DEPLOY / "systemd/glmjax.service").read_text("utf-8")
    done = unit(tmp_path, text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "Unknown key" in unit(tmp_path, text.replace("TimeoutStopSec", "TimeoutStop")).stderr
    assert "not executable" in unit(tmp_path, text.replace("bin/python", "bin/pyton")).stderr


def test_the_unit_waits_for_the_drain_and_its_options_are_taken():
    text = (DEPLOY / "systemd/glmjax.service").read_text("utf-8")
    options = re.findall(
        r'^GLMJAX_OPTIONS="(.*)"$', (DEPLOY / "systemd/glmjax.env").read_text("utf-8"), re.M
    )
    args = serve.parser().parse_args(shlex.split(options[0]))
    assert re.findall(r"^ExecStart=\S+ serve.py \$GLMJAX_OPTIONS$", text, re.M)
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)[0]) > args.drain_timeout_s


def test_the_image_has_what_serving_needs():
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert not [name for name in copied if not (ROOT / name).exists()]
    assert {"serve.py", "glmjax", "pallas_kernels", "convert", "constraints.txt"} <= copied
    command = next(line for line in lines if line.startswith("CMD"))
    words = yaml.safe_load(command.removeprefix("CMD"))
    PARSERS[tuple(words[:2])](words[2:])
    assert "USER 1000" in lines


def test_commands_on_the_page_are_taken_by_the_programs():
    lines = command_lines((ROOT / "docs/deploy.md").read_text("utf-8"))
    ours = [words for words in lines if tuple(words[:2]) in PARSERS]
    assert len({tuple(words[:2]) for words in ours}) == len(PARSERS)
    for words in ours:
        PARSERS[tuple(words[:2])](words[2:])
    named = {words[0] for words in lines} - {"python", "smg"}
    assert named <= {"pip", "kubectl", "docker", "sudo", "curl", "systemctl", "journalctl", "."}


def test_the_page_names_files_and_metrics_that_there_are():
    text = (ROOT / "docs/deploy.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+?)\)", text)
    local = [link for link in links if "://" not in link]
    assert local
    assert not [link for link in local if not (ROOT / "docs" / link).exists()]
    source = (ROOT / "glmjax/server/metrics.py").read_text("utf-8")
    names = set(re.findall(r"(?:sglang|glmjax):[a-z]\w+", text))
    assert names
    assert not [n for n in names if re.sub("_(bucket|sum|count)$", "", n) not in source]
