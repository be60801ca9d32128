"""The gateway of deploy/kubernetes/replicas.yaml finds replicas, in an imitation of a cluster."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import openai
import yaml
from live import live

from gateway import HOST, is_ready, launched
from glmjax.server.served import ServedModel
from manifests import Pods, all_pods, arguments, selects

REPLICAS = Path(__file__).parents[2] / "deploy/kubernetes/replicas.yaml"
TIMEOUT_S = 60
ADMIN = "may-see-workers"
LIST = {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}}


@dataclass
class Cluster:
    """As much of Kubernetes' API as watches pods.

    Attributes:
        pods: those there are at first.
        events: what watchers are then told; None ends a watch.
        asked: the paths that were asked for.
    """

    pods: list[dict[str, Any]]
    events: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)
    asked: list[str] = field(default_factory=list)

    @contextmanager
    def serve(self, folder: Path) -> Iterator[Path]:
        """Gives a kubeconfig of it."""
        handler = type("Handler", (PodsHandler,), {"cluster": self})
        with ThreadingHTTPServer((HOST, 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield write_kubeconfig(folder, server.server_port)
            finally:
                self.events.put(None)
                server.shutdown()


class PodsHandler(BaseHTTPRequestHandler):
    """Lists pods, or streams events of them; both for the labels that are asked for."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.cluster.asked.append(url.path)
        query = parse_qs(url.query)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if "watch" in query:
            self.send_header("Connection", "close")
            self.end_headers()
            while event := self.cluster.events.get():
                self.wfile.write(json.dumps(event).encode() + b"\n")
            self.close_connection = True
            return
        labels = dict(pair.split("=") for pair in query["labelSelector"][0].split(","))
        pods = [p for p in self.cluster.pods if selects(labels, p["metadata"]["labels"])]
        body = json.dumps(LIST | {"items": pods}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def write_kubeconfig(folder: Path, port: int) -> Path:
    cluster = {"name": "c", "cluster": {"server": f"http://{HOST}:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
    config |= {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
    (folder / "kubeconfig").write_text(json.dumps(config), "utf-8")
    return folder / "kubeconfig"


def pod(pods: Pods, name: str, ip: str, ready: bool = True, **metadata: str) -> dict[str, Any]:
    """A running pod of a template, as the API tells of it."""
    labels = {"name": name, "namespace": "glmjax", "uid": name, "labels": pods.labels}
    status = {"phase": "Running", "podIP": ip}
    status |= {"conditions": [{"type": "Ready", "status": str(ready)}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": labels | {"resourceVersion": "1"} | metadata,
        "spec": {"containers": [{"name": "serve"}]},
        "status": status,
    }


def until(done: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_gateway_follows_the_pods_that_are_ready(served: ServedModel, tmp_path: Path):
    replicas, smg = all_pods(list(yaml.safe_load_all(REPLICAS.read_text("utf-8"))))
    # 127.0.0.9 has no server: whoever asks there is told so
    pods = [
        pod(replicas, "replica", HOST),
        pod(replicas, "loading", "127.0.0.9", ready=False),
        pod(smg, "gateway", "127.0.0.9"),
    ]
    cluster = Cluster(pods)
    with live(served, step_s=0.02) as server, cluster.serve(tmp_path) as kubeconfig:
        options = [*arguments(smg.containers[0]), "--service-discovery-port"]
        options += [str(server.grpc_port), "--control-plane-api-keys", f"t:t:admin:{ADMIN}"]
        names = served.name, tmp_path / "smg.log", "secret"
        with launched(options, *names, KUBECONFIG=str(kubeconfig)) as url:
            root = url.removesuffix("/v1")
            until(lambda: httpx.get(f"{root}/readiness").status_code == 200)
            assert workers(root) == [f"grpc://{HOST}:{server.grpc_port}"]
            assert not is_ready(url, served.name, "no key")
            check_removal(url, cluster, pod(replicas, "replica", HOST), served.name)
    assert set(cluster.asked) == {"/api/v1/namespaces/glmjax/pods"}  # all that its role allows


def check_removal(url: str, cluster: Cluster, gone: dict[str, Any], model: str) -> None:
    """A pod that terminates keeps what it answers, and gets no more."""
    root = url.removesuffix("/v1")
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        cluster.events.put({"type": "MODIFIED", "object": gone})
        until(lambda: workers(root) == [])
        ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert ends[-1] == "length"


def workers(root: str) -> list[str]:
    answer = httpx.get(f"{root}/workers", headers={"Authorization": f"Bearer {ADMIN}"})
    return [worker["url"] for worker in answer.json()["workers"]]
