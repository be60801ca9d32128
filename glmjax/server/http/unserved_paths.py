"""Paths of other servers' APIs that are not served here, and paths that are none at all."""

from __future__ import annotations

import difflib

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from glmjax.server.http.endpoints import ENDPOINTS

CHAT = "it answers at /v1/chat/completions, /v1/responses and /v1/messages"
MAX_PATH = 100  # characters of a path that are compared with those served
LIKENESS = 0.7  # of a path that may be meant, at least

# What is not served, and what may serve instead -> its paths, and all that lie under them.
UNSERVED: dict[str, tuple[str, ...]] = {
    f"this server makes no embeddings; {CHAT}": (
        "/v1/embeddings",
        "/embeddings",
        "/encode",
        "/pooling",
        "/api/embed",
        "/api/embeddings",
    ),
    "this server neither ranks nor classifies; log probabilities of a prompt come from "
    "/v1/completions with echo and logprobs": (
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/score",
        "/score",
        "/v1/classify",
        "/classify",
        "/v1/moderations",
    ),
    f"this server reads and writes text only; {CHAT}": (
        "/v1/images",
        "/v1/audio",
        "/v1/videos",
        "/v1/realtime",
    ),
    "this server keeps no files, batches or jobs; send each request to /v1/chat/completions": (
        "/v1/files",
        "/v1/uploads",
        "/v1/batches",
        "/v1/messages/batches",
        "/v1/fine_tuning",
        "/v1/fine-tunes",
        "/v1/evals",
        "/v1/skills",
    ),
    "this server keeps no conversations; send the whole conversation to /v1/responses or "
    "/v1/chat/completions": (
        "/v1/assistants",
        "/v1/threads",
        "/v1/conversations",
        "/v1/containers",
        "/v1/vector_stores",
        "/v1/chat/completions",
        "/open_session",
        "/close_session",
    ),
    "this older form is not served; use /v1/completions or /v1/messages": (
        "/v1/edits",
        "/v1/engines",
        "/v1/complete",
    ),
    f"this form is not served; {CHAT}": (
        "/api/chat",
        "/api/generate",
        "/api/tags",
        "/api/show",
        "/invocations",
        "/vertex_generate",
    ),
    "weights are those that the server was started with; to serve others start it on another "
    "folder": (
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/update_weight_version",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/init_weights_send_group_for_remote_instance",
        "/send_weights_to_remote_instance",
        "/get_weights_by_name",
        "/weights_checker",
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ),
    "memory is held while the server runs; /pause_generation stops its steps, /flush_cache empties "
    "the prefix cache": (
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/sleep",
        "/wake_up",
        "/clear_hicache_storage_backend",
        "/reset_prefix_cache",
    ),
    "this server is not profiled over HTTP; /metrics and /get_server_info tell how it does": (
        "/start_profile",
        "/stop_profile",
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
        "/set_trace_level",
    ),
    "settings are those that the server was started with; /get_server_info tells them": (
        "/configure_logging",
        "/set_internal_state",
        "/slow_down",
        "/freeze_gc",
    ),
}


class NotServedError(HTTPException):
    """A path that is not served. HTTP 404, since clients try again what has a status above 500.

    Attributes:
        code: "not_served" where the path is one of another server's; else "unknown_path".
    """

    def __init__(self, message: str, code: str):
        super().__init__(404, message)
        self.code = code


def refusal(path: str) -> NotServedError:
    """Why a path is not served, with the nearest of those that are."""
    for why, roots in UNSERVED.items():
        if any(path == root or path.startswith(f"{root}/") for root in roots):
            return NotServedError(f"not served: {why}", "not_served")
    near = difflib.get_close_matches(path[:MAX_PATH], ENDPOINTS, n=1, cutoff=LIKENESS)
    hint = f"did you mean {near[0]}?" if near else "/openapi.json lists what there is"
    return NotServedError(f"no such path; {hint}", "unknown_path")


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that refuses every request; it stands behind all routes."""
    raise refusal(scope["path"])
