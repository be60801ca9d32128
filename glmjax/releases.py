"""The official releases of the GLM-4.5 family, by their names."""

from __future__ import annotations

from dataclasses import replace

from glmjax.config import ModelConfig, QuantConfig
from glmjax.errors import ConfigError

ORGANISATION = "zai-org/"

_EOS = (151329, 151336, 151338)
_AIR = ModelConfig(attention_bias=True, rope_theta=1e6, eos_token_ids=_EOS)
_GLM45 = replace(
    _AIR,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=92,
    n_routed_experts=160,
    first_k_dense_replace=3,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
)
_GLM46 = replace(_GLM45, max_position_embeddings=202752)


def _fp8_ignore(config: ModelConfig) -> tuple[str, ...]:
    """Modules that the FP8 releases leave unquantised, besides embeddings and norms."""
    last = config.num_hidden_layers
    routers = range(config.first_k_dense_replace, last + 1)
    gates = tuple(f"model.layers.{i}.mlp.gate" for i in routers)
    return ("lm_head", f"model.layers.{last}.eh_proj", *gates)


def _fp8(config: ModelConfig) -> ModelConfig:
    return replace(config, quant=QuantConfig("compressed-tensors", None, _fp8_ignore(config)))


_BASES = {"GLM-4.5-Air": _AIR, "GLM-4.5": _GLM45, "GLM-4.6": _GLM46, "GLM-4.7": _GLM46}
KNOWN_MODELS: dict[str, ModelConfig] = {
    f"{ORGANISATION}{name}": config for name, config in _BASES.items()
} | {f"{ORGANISATION}{name}-FP8": _fp8(config) for name, config in _BASES.items()}


def release(name: str) -> ModelConfig:
    """The exact config of a release, such as "zai-org/GLM-4.5-Air-FP8" or "GLM-4.5-Air-FP8".

    Raises:
        ConfigError: the name is not an official release.
    """
    found = KNOWN_MODELS.get(name) or KNOWN_MODELS.get(ORGANISATION + name)
    if found is None:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(sorted(KNOWN_MODELS))}")
    return found
