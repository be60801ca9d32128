"""What a server tells about itself, in SGLang's words, to both protocols."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

from glmjax.server.frontend import Frontend

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


def server_info(frontend: Frontend) -> dict[str, Any]:
    """Everything of /get_server_info."""
    return server_args(frontend) | {
        "status": frontend.engine.state,
        "uptime_seconds": time.time() - frontend.started,
        "internal_states": [load_numbers(frontend)],
    }
