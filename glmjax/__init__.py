"""glmjax: a JAX/XLA server for the GLM-4.5 family.

    glmjax.generate(prompts)              one call, with the bundled glm-nano
    glmjax.generate(prompts, model=DIR)   with a model of your own
    glmjax.LLM(DIR, mesh=8)               a model kept loaded
    glmjax.Engine(runner)                 continuous batching, step by step
    glmjax.plan("zai-org/GLM-4.5-FP8")    what a model takes of which GPUs, with none there

Names are imported when first used, so that the parts without JAX stay free of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
    from glmjax.engine import Engine
    from glmjax.errors import GlmjaxError
    from glmjax.llm import LLM, Completion, generate
    from glmjax.planner.plan import Plan, Workload, plan
    from glmjax.text.parts import Message, ToolCall
    from glmjax.types import FinishReason, Request, RequestOutput, SamplingParams

_HOMES = {
    "CacheConfig": "glmjax.config",
    "MeshConfig": "glmjax.config",
    "ModelConfig": "glmjax.config",
    "SchedulerConfig": "glmjax.config",
    "Engine": "glmjax.engine",
    "GlmjaxError": "glmjax.errors",
    "LLM": "glmjax.llm",
    "Completion": "glmjax.llm",
    "generate": "glmjax.llm",
    "Plan": "glmjax.planner.plan",
    "Workload": "glmjax.planner.plan",
    "plan": "glmjax.planner.plan",
    "Message": "glmjax.text.parts",
    "ToolCall": "glmjax.text.parts",
    "FinishReason": "glmjax.types",
    "Request": "glmjax.types",
    "RequestOutput": "glmjax.types",
    "SamplingParams": "glmjax.types",
}

__all__ = [
    "LLM",
    "CacheConfig",
    "Completion",
    "Engine",
    "FinishReason",
    "GlmjaxError",
    "MeshConfig",
    "Message",
    "ModelConfig",
    "Plan",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "ToolCall",
    "Workload",
    "generate",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glmjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
