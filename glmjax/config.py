"""Every configuration of glmjax: frozen, validated when made, never imports jax."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glmjax.errors import ConfigError
from pallas_kernels.backend import REF, Backend

ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"
DTYPES = ("bfloat16", "float32")
# --kv-cache-dtype, called as in SGLang -> what K and V are stored as; "auto": as the model computes
KV_DTYPES = {"bfloat16": "bfloat16", "fp8_e4m3": "float8_e4m3fn"}
KV_CHOICES = ("auto", *KV_DTYPES)
DEFAULT_POOL_BYTES = 1 << 30
MOST_PER_HOST = 8  # GPUs
# What XLA takes of a GPU's memory. The rest is left to CUDA, its libraries and NCCL's buffers.
MEMORY_FRACTION = 0.92
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
MAX_DRAFTS = 15  # beyond that none is accepted often enough to pay


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint's FP8 weights are scaled.

    Attributes:
        method: "compressed-tensors" (one scale an output channel) or "fp8" (one a block).
        block_size: (rows, columns) of a block, or None with one scale an output channel.
        ignore: module names that the checkpoint says are not quantised.
    """

    method: str
    block_size: tuple[int, int] | None = None
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> QuantConfig:
        """Read a `quantization_config`.

        Raises:
            ConfigError: a method or format other than the two FP8 forms above.
        """
        method = raw.get("quant_method")
        if method == "compressed-tensors" and raw.get("format") == "float-quantized":
            return cls(method, None, _names(raw, "ignore"))
        if method == "fp8" and raw.get("weight_block_size"):
            return cls(method, _block_size(raw), _names(raw, "modules_to_not_convert"))
        raise ConfigError(
            f"quantization_config has quant_method {method!r}, format {raw.get('format')!r}; "
            "glmjax reads compressed-tensors float-quantized and fp8 with weight_block_size. "
            "Convert the BF16 release of this model instead."
        )


def _block_size(raw: dict[str, Any]) -> tuple[int, int]:
    match raw["weight_block_size"]:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise ConfigError(f"weight_block_size is {other!r}, expected two positive integers")


def _names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    names = _group(raw, key, list)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} is {names!r}, expected module names")
    return tuple(names)


def _group(raw: dict[str, Any], key: str, kind: type) -> Any:
    """A list or an object of a config.json; empty when it is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{key} is {value!r}, expected {kind.__name__}")
    return value or kind()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a GLM-4.5 model, by their HF names (config.json of `glm4_moe`).

    `deterministic`, `expert_parallel` and `kernels` are not the model's but how it runs.

    Raises:
        ConfigError: sizes that cannot belong to a model.
    """

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    n_routed_experts: int = 128
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = False
    attention_bias: bool = False
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    quant: QuantConfig | None = None
    deterministic: bool = False
    expert_parallel: bool = False
    kernels: Backend = REF

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_model(self)

    @property
    def rotary_dim(self) -> int:
        """Leading dims of a head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared expert."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, the MTP block not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def replicated(self, tensor: int) -> ModelConfig:
        """The model as `tensor` tensor-parallel devices run it.

        With r devices a KV head that is a model with `tensor` of them: each KV head repeated r
        times, its query heads shared out. Where they do not share out evenly the model stays as it
        is, and `MeshConfig.check` refuses it.
        """
        repeats, rest = divmod(tensor, self.num_key_value_heads)
        queries = self.num_attention_heads // self.num_key_value_heads
        if rest or repeats == 1 or queries % repeats:
            return self
        return replace(self, num_key_value_heads=tensor)

    def kv_bytes_per_token(self, dtype: str | None = None, drafting: bool = False) -> int:
        """Bytes of K and V for one position in all layers; the MTP block's with `drafting` only.

        `dtype` is what they are stored as, "float8_e4m3fn" too; None: the model's.
        """
        heads = 2 * self.num_key_value_heads * self.head_dim
        return (self.num_hidden_layers + drafting) * heads * _ITEM_BYTES[dtype or self.dtype]

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelConfig:
        """Read a config.json, or the one in a folder, in transformers 4 or 5 spelling.

        Raises:
            ConfigError: no such file, not JSON, not a GLM-4.5, or sizes that cannot be.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        raw = read_json(file)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the contents of a config.json. Raises ConfigError as `from_hf` does."""
        _check_architecture(raw)
        values = {name: raw[key] for key, name in _HF_KEYS.items() if raw.get(key) is not None}
        values |= _rope(raw)
        values["eos_token_ids"] = token_ids(raw.get("eos_token_id"))
        if quantization := _group(raw, "quantization_config", dict):
            values["quant"] = QuantConfig.from_hf(quantization)
        _check_types(values)
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            values["head_dim"] = values["hidden_size"] // max(values["num_attention_heads"], 1)
        return cls(**values)


_HOW_IT_RUNS = {"deterministic", "expert_parallel", "kernels"}  # no config.json has them

# config.json key -> field. Where transformers 4 and 5 differ both spellings stand here.
_HF_KEYS = {
    name: name
    for name, spec in ModelConfig.__dataclass_fields__.items()
    if name not in {"eos_token_ids", "quant", "rope_theta", "partial_rotary_factor", *_HOW_IT_RUNS}
} | {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError when there is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a model folder must hold it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Normalise an HF `eos_token_id`: absent, one id or a list. Raises ConfigError for the rest."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"eos_token_id is {value!r}, expected a token id or a list of them")
    return tuple(ids)


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    parameters = _group(raw, "rope_parameters", dict) | _group(raw, "rope_scaling", dict)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind != "default":
        raise ConfigError(f"rope type {kind!r} is not served; GLM-4.5 releases use 'default'")
    merged = raw | {key: value for key, value in parameters.items() if value is not None}
    keys = ("rope_theta", "partial_rotary_factor")
    return {key: merged[key] for key in keys if merged.get(key) is not None}


def _check_architecture(raw: dict[str, Any]) -> None:
    names = _group(raw, "architectures", list)
    if raw.get("model_type") != MODEL_TYPE or (names and ARCHITECTURE not in names):
        raise ConfigError(
            f"architecture {names} (model_type {raw.get('model_type')!r}) is not served; glmjax "
            f"serves {ARCHITECTURE} (model_type {MODEL_TYPE!r}): GLM-4.5, -Air, 4.6 and 4.7, not "
            "GLM-4.7-Flash, GLM-5 or the vision models"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}, expected 'silu'")


def _check_types(values: dict[str, Any]) -> None:
    for name, value in values.items():
        expected = type(getattr(ModelConfig, name))
        wrong_bool = isinstance(value, bool) != (expected is bool)
        accepted = (int, float) if expected is float else expected
        if name != "quant" and (wrong_bool or not isinstance(value, accepted)):
            raise ConfigError(f"{name} is {value!r}, expected {expected.__name__}")


def _check_positive(config: ModelConfig) -> None:
    may_be_zero = {"first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"}
    for name in ModelConfig.__dataclass_fields__:
        value = getattr(config, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            zero_is_fine = name in may_be_zero
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero_is_fine):
                expected = "0 or more" if zero_is_fine else "a positive number"
                raise ConfigError(f"{name} is {value}, expected {expected}")


def _check_model(c: ModelConfig) -> None:
    rules = [
        (
            c.num_attention_heads % c.num_key_value_heads == 0,
            f"num_attention_heads {c.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {c.num_key_value_heads}",
        ),
        (
            c.num_experts_per_tok <= c.n_routed_experts,
            f"num_experts_per_tok {c.num_experts_per_tok} exceeds n_routed_experts "
            f"{c.n_routed_experts}",
        ),
        (
            c.n_routed_experts % c.n_group == 0 and c.topk_group <= c.n_group,
            f"n_routed_experts {c.n_routed_experts}, n_group {c.n_group} and topk_group "
            f"{c.topk_group} do not fit: groups divide the experts, topk_group is at most n_group",
        ),
        (
            c.n_group == 1
            or (
                c.n_routed_experts // c.n_group >= 2
                and c.num_experts_per_tok <= c.topk_group * (c.n_routed_experts // c.n_group)
            ),
            f"n_group {c.n_group} leaves too few experts a group to choose {c.num_experts_per_tok}",
        ),
        (
            c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace {c.first_k_dense_replace} exceeds num_hidden_layers "
            f"{c.num_hidden_layers}",
        ),
        (
            0 < c.partial_rotary_factor <= 1 and c.rotary_dim % 2 == 0 and c.rotary_dim > 0,
            f"head_dim {c.head_dim} x partial_rotary_factor {c.partial_rotary_factor} gives "
            f"{c.rotary_dim} rotary dims, expected an even number from 2 to head_dim",
        ),
        (
            c.num_nextn_predict_layers <= 1,
            f"num_nextn_predict_layers is {c.num_nextn_predict_layers}, expected 0 or 1",
        ),
        (c.n_shared_experts >= 1, "n_shared_experts is 0, expected 1 or more"),
        (c.dtype in DTYPES, f"dtype is {c.dtype!r}, expected one of {', '.join(DTYPES)}"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


@dataclass(frozen=True)
class MeshConfig:
    """Devices: `data` groups that serve different requests, each sharded `tensor` ways.

    Weights are sharded over `tensor` and repeated over `data`; requests and KV pages are split over
    `data`.

    Attributes:
        data, tensor: groups, and devices of each.
        expert_parallel: each device of a group has whole experts, E / tensor of them, rather than a
            part of every expert's width.
        hosts: machines that the devices are in, an equal number in each, groups one after another.
    """

    data: int = 1
    tensor: int = 1
    expert_parallel: bool = False
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 or self.tensor < 1:
            raise ConfigError(f"mesh {self}: both axes must be 1 or more")
        if self.hosts < 1 or self.size % self.hosts:
            raise ConfigError(
                f"mesh {self} has {self.size} devices, which do not divide over {self.hosts} hosts"
            )

    def __str__(self) -> str:
        return f"{self.data}x{self.tensor}"

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.tensor

    @property
    def devices_per_host(self) -> int:
        """Devices of each machine."""
        return self.size // self.hosts

    @classmethod
    def parse(cls, text: str | int, *, expert_parallel: bool = False, hosts: int = 1) -> MeshConfig:
        """Read "8" (tensor parallel 8) or "2x4" (2 data groups of tensor parallel 4).

        Raises:
            ConfigError: anything else.
        """
        parts = str(text).lower().split("x")
        if not (1 <= len(parts) <= 2 and all(p.isascii() and p.isdigit() for p in parts)):
            raise ConfigError(
                f"mesh is {text!r}, expected N (tensor parallel N) or DxT (D data groups of "
                "tensor parallel T), such as 8 or 2x4"
            )
        data, tensor = [1, *map(int, parts)][-2:]
        return cls(data, tensor, expert_parallel, hosts)

    def on_hosts(self) -> MeshConfig:
        """The same devices on as few machines, of MOST_PER_HOST at most, as share them evenly."""
        counts = range(-(-self.size // MOST_PER_HOST), self.size + 1)
        return replace(self, hosts=next(n for n in counts if self.size % n == 0))

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError unless every sharded size of `model` divides over `tensor`.

        KV heads may be fewer: then they are repeated, as `ModelConfig.replicated` says.
        """
        uneven = _uneven(model, self.tensor, self.expert_parallel)
        if uneven:
            fitting = map(str, tensor_sizes(model, self.expert_parallel))
            raise ConfigError(
                f"a mesh with tensor parallel {self.tensor} does not divide {', '.join(uneven)} "
                f"of this model; tensor parallel sizes that fit: {', '.join(fitting)}"
            )


def tensor_sizes(model: ModelConfig, expert_parallel: bool = False) -> list[int]:
    """The tensor-parallel sizes that divide `model`, smallest first."""
    candidates = range(1, model.moe_intermediate_size + 1)
    return [n for n in candidates if not _uneven(model, n, expert_parallel)]


def _uneven(model: ModelConfig, tensor: int, expert_parallel: bool) -> list[str]:
    """The sizes of `model` that `tensor` devices can neither divide nor, for KV heads, repeat."""
    queries = model.num_attention_heads // model.num_key_value_heads
    notes = {
        "num_key_value_heads": f" ({queries} query heads each)",
        "intermediate_size": "",
        "moe_intermediate_size": "",
        "vocab_size": "",
    } | ({"n_routed_experts": ""} if expert_parallel else {})
    run = model.replicated(tensor)
    return [
        f"{name} {getattr(model, name)}{note}"
        for name, note in notes.items()
        if getattr(run, name) % tensor
    ]


class Sizes(NamedTuple):
    """Requests at once and how finely it works, where nothing is said."""

    max_running_requests: int
    chunked_prefill_size: int
    page_size: int


SIZES = {"cpu": Sizes(32, 256, 16), "gpu": Sizes(128, 2048, 64)}


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV pool.

    Attributes:
        page_size: token positions a page.
        num_pages: pages a data group, the scratch page included; None: from `memory_bytes`.
        memory_bytes: what the pool of one device may take when `num_pages` is None; None: what is
            left of a GPU's memory, or DEFAULT_POOL_BYTES on a CPU. Who updates weights while it
            runs must leave room for them twice.
        dtype: "bfloat16"; "fp8_e4m3", which has no scale and is clamped to +-448, in half the
            bytes; or "auto", the model's.
    """

    page_size: int = SIZES["cpu"].page_size
    num_pages: int | None = None
    memory_bytes: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.page_size < 1 or (self.num_pages is not None and self.num_pages < 2):
            raise ConfigError(
                f"page_size {self.page_size} must be 1 or more and num_pages {self.num_pages} "
                "2 or more (page 0 is scratch)"
            )
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ConfigError(f"the KV pool's memory_bytes is {self.memory_bytes}, expected more")
        if self.dtype not in KV_CHOICES:
            raise ConfigError(
                f"the KV pool's dtype is {self.dtype!r}, expected one of {', '.join(KV_CHOICES)}"
            )

    def stored_dtype(self, model: ModelConfig) -> str:
        """What K and V of `model` are stored as, by numpy's name."""
        return KV_DTYPES.get(self.dtype, model.dtype)


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share the device.

    Attributes:
        max_running_requests: sequences that run at once, over all data groups.
        max_queued_requests: sequences that may wait; one more is refused.
        chunked_prefill_size: prompt tokens computed a step, a data group, beside all that decode.
        max_seq_len: longest sequence served; None: the model's.
        speculative_num_steps: drafts a step makes for each sequence, where the model has an MTP
            block; 0: no drafting.
        prefix_cache: keep the KV of what was computed, for requests that begin alike.
        deterministic: round alike in every batch, at a cost: also in bfloat16 a request's output
            depends on nothing but itself and the tensor-parallel size.
    """

    max_running_requests: int = SIZES["cpu"].max_running_requests
    max_queued_requests: int = 1024
    chunked_prefill_size: int = SIZES["cpu"].chunked_prefill_size
    max_seq_len: int | None = None
    speculative_num_steps: int = 3
    prefix_cache: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        least = {"max_running_requests": 1, "max_queued_requests": 1, "chunked_prefill_size": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {bound} or more")
        if not 0 <= self.speculative_num_steps <= MAX_DRAFTS:
            raise ConfigError(
                f"speculative_num_steps is {self.speculative_num_steps}, expected 0 (no drafting) "
                f"to {MAX_DRAFTS}"
            )
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len is {self.max_seq_len}, expected 2 or more")
