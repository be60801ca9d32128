"""What a server tells about itself, in SGLang's words, to both protocols."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

from glmjax.config import ARCHITECTURE, MODEL_TYPE
from glmjax.server.engine_thread import Snapshot
from glmjax.server.frontend import Frontend
from glmjax.server.metrics import accept_length, cache_hit_rate
from glmjax.server.request_times import RequestTimes

VERSION = f"glmjax {importlib.metadata.version('glmjax')}"


def server_args(frontend: Frontend) -> dict[str, Any]:
    """What is served, and within which limits."""
    served, load = frontend.served, frontend.engine.load()
    return {
        "model_path": str(served.folder),
        "tokenizer_path": str(served.folder),
        "served_model_name": served.name,
        "context_length": served.max_seq_len,
        "max_total_tokens": load.max_total_tokens,
        "max_running_requests": load.max_running_requests,
        "vocab_size": served.config.vocab_size,
    }


def model_info(frontend: Frontend) -> dict[str, Any]:
    """Everything of /get_model_info."""
    args = server_args(frontend)
    names = ("model_path", "tokenizer_path", "served_model_name")
    return {name: args[name] for name in names} | {
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": frontend.engine.snapshot().weight_version,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
    }


def load_numbers(frontend: Frontend) -> dict[str, Any]:
    """How busy the server is; shares are between 0 and 1."""
    load = frontend.engine.load()
    return {
        "num_running_reqs": load.running,
        "num_waiting_reqs": load.waiting,
        "num_total_reqs": load.running + load.waiting,
        "num_used_tokens": load.used_tokens,
        "max_total_num_tokens": load.max_total_tokens,
        "token_usage": load.used_tokens / max(load.max_total_tokens, 1),
        "utilization": load.running / max(load.max_running_requests, 1),
        "max_running_requests": load.max_running_requests,
    }


def server_info(frontend: Frontend, times: RequestTimes) -> dict[str, Any]:
    """Everything of /get_server_info."""
    snapshot = frontend.engine.snapshot()
    throughput = {"last_gen_throughput": times.tokens.per_second(time.monotonic())}
    return server_args(frontend) | {
        "status": frontend.engine.state,
        "paused": snapshot.paused,
        "weight_version": snapshot.weight_version,
        "uptime_seconds": time.time() - frontend.started,
        "internal_states": [load_numbers(frontend) | throughput | _since_start(snapshot)],
    }


def _since_start(snapshot: Snapshot) -> dict[str, Any]:
    """What the prefix cache and drafting have brought."""
    counters = snapshot.counters
    return {
        "num_cached_tokens": snapshot.load.cached_tokens,
        "cache_hit_rate": cache_hit_rate(counters),
        "avg_spec_accept_length": accept_length(counters),
    }
