"""JAX over several processes: what it is told, so that it guesses nothing."""

from __future__ import annotations

import logging
import os

import jax

from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.hosts.joining import Place, bind_host
from glmjax.hosts.relay import start_relay

log = logging.getLogger(__name__)

START_S = 300
# Ours notice a host that is gone in seconds; JAX's own is for what they cannot see.
HEARTBEAT_S = 120
SHUTDOWN_S = 10
# Else every process tunes a part of each program, and waits for the others' parts.
FLAGS = "--xla_gpu_shard_autotuning=false"


def connect(place: Place, mesh: MeshConfig) -> None:
    """Make the devices of all hosts one system, before JAX is first used; alone do nothing.

    The hosts must have met: `glmjax.hosts.joining`.
    """
    if place.hosts == 1:
        return
    _configure(place, mesh)
    leads = place.index == 0
    jax.distributed.initialize(
        place.coordinator if leads else f"127.0.0.1:{start_relay(place.host, place.port)}",
        place.hosts,
        place.index,
        cluster_detection_method="deactivate",
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
        coordinator_bind_address=_bind_address(place) if leads else None,
    )
    kinds = {device.device_kind for device in jax.devices()}
    if len(kinds) > 1:
        raise ConfigError(f"hosts have different devices: {', '.join(sorted(kinds))}")
    log.info("the devices of %d hosts are connected", place.hosts)


def _configure(place: Place, mesh: MeshConfig) -> None:
    """What JAX must know before it starts."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    os.environ["no_grpc_proxy"] = f"{place.host},127.0.0.1"  # noqa: SIM112  gRPC's spelling
    options = {
        "jax_cpu_collectives_implementation": "gloo",
        "jax_num_cpu_devices": mesh.devices_per_host,
        "jax_check_proxy_envs": False,
        "jax_enable_preemption_service": False,  # it would take SIGTERM for itself
    }
    for name, value in options.items():
        jax.config.update(name, value)


def _bind_address(place: Place) -> str:
    """Where the coordinator listens, on host 0."""
    host = bind_host(place) or "::"
    return f"[{host}]:{place.port}" if ":" in host else f"{host}:{place.port}"
