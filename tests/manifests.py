"""What can be wrong with a folder of Kubernetes documents, found without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import kubernetes_validate
from smg.launch_router import parse_router_args

import serve
from glmjax.config import MeshConfig

Document = dict[str, Any]

# The API's own fields, of leaderworkerset.x-k8s.io/v1 as of LeaderWorkerSet 0.8; the templates in
# it are checked as pods.
COUNT = {"type": "integer", "minimum": 1}
LEADER_WORKER_SET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                **{name: {"type": "string"} for name in ("name", "namespace")},
                **{name: {"type": "object"} for name in ("labels", "annotations")},
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["leaderWorkerTemplate"],
            "properties": {
                "replicas": COUNT,
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "networkConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"subdomainPolicy": {"enum": ["Shared", "UniquePerReplica"]}},
                },
                "leaderWorkerTemplate": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["workerTemplate"],
                    "properties": {
                        "size": COUNT,
                        "restartPolicy": {
                            "enum": ["None", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart"]
                        },
                        "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                    },
                },
            },
        },
    },
}
# What the controller puts into the environment of every container of a group.
GROUP_VARIABLES = {"LWS_LEADER_ADDRESS": "leader.example", "LWS_WORKER_INDEX": "0"}
SELECTS_PODS = ("Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy")


@dataclass(frozen=True)
class Pods:
    """A template of pods.

    Attributes:
        name: of the document, and of the template where that has two.
        template: metadata and spec.
        hosts: in a group of hosts that serve one model.
    """

    name: str
    template: Document
    hosts: int = 1

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def containers(self) -> list[Document]:
        return self.template["spec"]["containers"]

    @property
    def ports(self) -> set[str | int]:
        """Names and numbers."""
        ports = [port for c in self.containers for port in c.get("ports", [])]
        return {port["containerPort"] for port in ports} | {port["name"] for port in ports}


def all_pods(documents: list[Document]) -> list[Pods]:
    """Every template of pods."""
    found = []
    for doc in documents:
        name = doc["metadata"]["name"]
        if doc["kind"] == "Deployment":
            found.append(Pods(name, doc["spec"]["template"]))
        if doc["kind"] == "LeaderWorkerSet":
            group = doc["spec"]["leaderWorkerTemplate"]
            for part in ("leaderTemplate", "workerTemplate"):
                found.append(Pods(f"{name} {part}", group[part], group["size"]))
    return found


def faults(documents: list[Document]) -> list[str]:
    """What is wrong, in words; references are looked up in these documents only."""
    found = [fault for doc in documents for fault in schema_faults(doc)]
    if found:
        return found
    pods = all_pods(documents)
    for doc in documents:
        found += selector_faults(doc, pods)
    for some in pods:
        found += [f"{some.name}: {fault}" for fault in pod_faults(some, pods)]
    return found


def schema_faults(doc: Document) -> Iterator[str]:
    """By Kubernetes' own schemas, in which unknown fields are errors."""
    try:
        if doc["kind"] == "LeaderWorkerSet":
            jsonschema.validate(doc, LEADER_WORKER_SET)
            for pods in all_pods([doc]):
                pod = {"apiVersion": "v1", "kind": "Pod", **pods.template}
                validate({**pod, "metadata": {"name": "pod", **pod["metadata"]}})
        else:
            validate(doc)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        yield f"{doc['kind']} {doc['metadata'].get('name')}: {error.message}"


def validate(doc: Document) -> None:
    kubernetes_validate.validate(doc, kubernetes_validate.latest_version(), strict=True)


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a selector, of either form, matches labels. An empty one matches all."""
    if not {"matchLabels", "matchExpressions"} & selector.keys():
        return selector.items() <= labels.items()
    wanted = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "In" for rule in wanted), "only In is understood here"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(rule["key"]) in rule["values"] for rule in wanted
    )


def selector_faults(doc: Document, pods: list[Pods]) -> Iterator[str]:
    """Selectors without pods, and ports that these pods do not have."""
    if doc["kind"] not in SELECTS_PODS:
        return
    name, spec = f"{doc['kind']} {doc['metadata']['name']}", doc["spec"]
    chosen = [p for p in pods if selects(spec.get("selector") or spec["podSelector"], p.labels)]
    if not chosen:
        yield f"{name}: selects no pod"
    if doc["kind"] == "Deployment" and not selects(
        spec["selector"], spec["template"]["metadata"]["labels"]
    ):
        yield f"{name}: does not select its own pods"
    ports = [port.get("targetPort", port["port"]) for port in spec.get("ports", [])]
    for rule in spec.get("ingress", []):
        ports += [port["port"] for port in rule.get("ports", [])]
        for peer in rule.get("from", []):
            if "podSelector" in peer and not any(
                selects(peer["podSelector"], p.labels) for p in pods
            ):
                yield f"{name}: lets in no pod"
    for port in ports:
        if not any(port in some.ports for some in chosen):
            yield f"{name}: no pod has port {port}"


def pod_faults(pods: Pods, others: list[Pods]) -> Iterator[str]:
    """Of a template: probes, volumes, and what its programs are told."""
    spec = pods.template["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in pods.containers:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if port is not None and port not in pods.ports:
                yield f"{probe}: the pod has no port {port}"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"there is no volume {mount['name']}"
        program = tuple(container["command"])
        yield from PROGRAMS[program](pods, container, others)


def arguments(container: Document) -> list[str]:
    """What a container's program is given, with $(NAME) put in as Kubernetes does."""
    known = GROUP_VARIABLES | {e["name"]: e.get("value", "secret") for e in container["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda m: known[m[1]], text) for text in container["args"]]


def serve_faults(pods: Pods, container: Document, others: list[Pods]) -> Iterator[str]:
    try:
        args = serve.parser().parse_args(arguments(container))
    except SystemExit:
        yield f"serve.py does not take {container['args']}"
        return
    yield from grace_faults(pods, args.drain_timeout_s)
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    if MeshConfig.parse(args.mesh).size != gpus * pods.hosts:
        yield f"--mesh {args.mesh} is not {pods.hosts} x {gpus} GPUs"
    ports = {args.port, args.grpc_port}
    if pods.hosts > 1:
        coordinator = int(args.coordinator.rpartition(":")[2])
        ports |= {coordinator, coordinator + 1}
        if args.hosts != pods.hosts:
            yield f"--hosts {args.hosts}, but the group has {pods.hosts}"
    if container.get("ports") and not ports <= pods.ports:
        yield f"it listens on {sorted(ports)}, but the pod names {sorted(map(str, pods.ports))}"


def smg_faults(pods: Pods, container: Document, others: list[Pods]) -> Iterator[str]:
    try:
        args = parse_router_args(arguments(container))
    except SystemExit:
        yield f"smg does not take {container['args']}"
        return
    yield from grace_faults(pods, args.shutdown_grace_period_secs)
    if not {args.port, args.prometheus_port} <= pods.ports:
        yield f"it listens on {args.port} and {args.prometheus_port}, which the pod does not name"
    workers = [some for some in others if selects(args.selector, some.labels)]
    if not any(args.service_discovery_port in some.ports for some in workers):
        yield f"no pod of {args.selector} has port {args.service_discovery_port}"


def grace_faults(pods: Pods, drain_s: float) -> Iterable[str]:
    grace_s = pods.template["spec"]["terminationGracePeriodSeconds"]
    if grace_s <= drain_s:
        yield f"killed after {grace_s} s, but it may drain for {drain_s:g} s"


PROGRAMS = {("python", "serve.py"): serve_faults, ("smg", "launch"): smg_faults}
