"""Settings of the transformer's shape. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError


class Activation(StrEnum):
    """The nonlinearity between the two matrices of a feed-forward network."""

    swiglu = "swiglu"
    geglu = "geglu"
    gelu = "gelu"
    relu = "relu"

    @property
    def is_gated(self) -> bool:
        """Whether half of the first matrix gates the other half."""
        return self in (Activation.swiglu, Activation.geglu)


class ExpertsImplementation(StrEnum):
    """How a layer's experts are computed; results are equal up to rounding."""

    auto = "auto"
    readable = "readable"
    slices = "slices"
    grouped_mm = "grouped_mm"


class SharedMix(StrEnum):
    """How the outputs of shared and routed experts are combined."""

    sum = "sum"
    learned = "learned"


class QKNorm(StrEnum):
    """What queries and keys are normalized over."""

    none = "none"
    head = "head"
    full = "full"


class RopeType(StrEnum):
    """How rotary frequencies are slowed for a context that is longer than that of pretraining."""

    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


_ROPE_KEYS = {
    RopeType.linear: (),
    RopeType.llama3: ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeType.yarn: ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
"""What each type reads besides ``factor``."""


@dataclass(kw_only=True)
class RopeScaling:
    """Slower rotary frequencies, which reach further than those of pretraining; its keys are those of Hugging Face's
    ``rope_parameters``."""

    rope_type: RopeType = RopeType.linear
    """``linear`` slows all frequencies alike, ``llama3`` and ``yarn`` the low ones more than the high ones."""
    factor: float = 1.0
    """How many times slower the slowest are; at least 1."""
    original_max_position_embeddings: int | None = None
    """``llama3`` and ``yarn``, which need it: tokens of a context in pretraining."""
    low_freq_factor: float = 1.0
    """``llama3``: frequencies of fewer turns in a context of pretraining are slowed by ``factor``."""
    high_freq_factor: float = 4.0
    """``llama3``: frequencies of more turns than this stay as they are."""
    beta_fast: float = 32.0
    """``yarn``: frequencies of more turns than this stay as they are."""
    beta_slow: float = 1.0
    """``yarn``: frequencies of fewer turns are slowed by ``factor``."""
    truncate: bool = True
    """``yarn``: move both borders to whole frequencies."""
    attention_factor: float | None = None
    """``yarn``: factor on queries and keys. Null: ``0.1 ln(factor) + 1``."""

    def __post_init__(self) -> None:
        require_bounded(self, "model.rope_scaling.")
        read = ("rope_type", "factor", *_ROPE_KEYS[RopeType(self.rope_type)])
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in read and value != field.default:
                raise ConfigError(f"model.rope_scaling.{field.name}={value} has no effect on {self.rope_type}.")
            # Written so that NaN is rejected as well.
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"model.rope_scaling.{field.name}={value} must be positive.")
        if not self.factor >= 1:
            raise ConfigError(f"model.rope_scaling.factor={self.factor} must be at least 1.")
        if "original_max_position_embeddings" in read and self.original_max_position_embeddings is None:
            raise ConfigError(f"model.rope_scaling.rope_type={self.rope_type} needs original_max_position_embeddings.")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ConfigError(f"model.rope_scaling.{low}={getattr(self, low)} must be below {high}.")


LATER = ("rope_scaling", "attention_bias", "qkv_clip", "window")
"""Keys of ``model`` that stages from before them do not name, whose own keys must not change; off by default."""


@dataclass(kw_only=True)
class ModelConfig:
    """Mixtral's shape by default: RMSNorm, RoPE, grouped-query attention, SwiGLU experts in every layer, no biases."""

    layers: int = 4
    """Number of decoder layers."""
    width: int = 128
    """Hidden size (D)."""
    heads: int = 4
    """Number of query heads; without ``head_width``, ``width`` must be an even multiple of it."""
    kv_heads: int = 2
    """Number of key and value heads; ``heads`` must be a multiple of it."""
    expert_width: int = 256
    """Hidden size of one expert (F)."""
    # Any, since an OmegaConf field cannot be a number or a list.
    experts: Any = 4
    """Experts per layer in the first stage; or a list with a number for each layer that has experts, bottom to top (the
    pyramid of DeepSpeed-MoE)."""
    activation: Activation = Activation.swiglu
    """Nonlinearity of the experts: ``swiglu`` or ``geglu``, which are gated, or ``gelu`` or ``relu``, which are not."""
    moe_every: int = 1
    """Every ``moe_every``-th layer has a mixture of experts; the others are dense (GLaM: 2)."""
    dense_layers: int = 0
    """Number of lowest layers that are dense whatever ``moe_every`` says (DeepSeek-V3: 3)."""
    dense_width: int | None = None
    """Hidden size of a dense layer's feed-forward network. Null: ``expert_width`` times ``routing.top_k``, as large as
    the experts that a token uses in other layers."""
    dense_activation: Activation = Activation.swiglu
    """Nonlinearity of dense layers; the values are those of ``activation``."""
    shared_experts: int = 0
    """Experts in each mixture that every token uses besides the routed ones, computed as one network (DeepSeekMoE)."""
    shared_mix: SharedMix = SharedMix.sum
    """How the outputs of shared and routed experts are combined: their ``sum``, or an average with weights from a
    ``learned`` softmax per token (DeepSpeed-MoE)."""
    context: int = 256
    """Tokens in a training block and in an evaluation window."""
    rope_base: float = 10_000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = None
    """Slower frequencies for a longer context, a section of its own. Null: as they are."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    head_width: int | None = None
    """Width of an attention head, even. Null: ``width / heads``."""
    qk_norm: QKNorm = QKNorm.none
    """Normalize queries and keys over each ``head`` (Qwen3), over the ``full`` projection (OLMoE), or not at all
    (``none``)."""
    attention_bias: bool = False
    """Add biases to queries, keys and values (Qwen2)."""
    qkv_clip: float | None = None
    """Cut queries, keys and values to this size, either sign (OLMo). Null: no cut."""
    window: int | None = None
    """Tokens that a token attends to, itself and those right before it (Mistral). Null: all of its context."""
    attention_softcap: float | None = None
    """Bound ``c`` on attention logits, which become ``c tanh(logits / c)`` (Grok-1: 30). Null: no bound."""
    embedding_scale: float = 1.0
    """Factor on the token embeddings (Grok-1: the square root of the width)."""
    logit_scale: float = 1.0
    """Factor on the output logits (Grok-1: ``1 / sqrt(3)``)."""
    sandwich_norms: bool = False
    """Normalize the output of each sublayer as well as its input (Grok-1)."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head (Mixtral does not)."""
    document_mask: bool = False
    """Let tokens attend within their own document only. If false, a packed block is one causal sequence."""
    init_std: float = 0.02
    """Standard deviation of the normal initialization of every matrix, except router rows and experts of routing modes
    whose authors initialize them differently (``switch``, ``base``, ``vmoe``)."""

    def __post_init__(self) -> None:
        require_bounded(self, "model.")
        for key in ("layers", "width", "heads", "kv_heads", "expert_width", "context", "moe_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} must be at least 1.")
        for key in ("head_width", "dense_width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} must be at least 1.")
        above_zero = ("norm_eps", "init_std", "embedding_scale", "logit_scale")
        for key, least in (("rope_base", 1.0), *((key, 1e-12) for key in above_zero)):
            # Written so that NaN is rejected as well.
            if not getattr(self, key) >= least:
                raise ConfigError(f"model.{key}={getattr(self, key)} must be at least {least}.")
        for key in ("attention_softcap", "qkv_clip", "window"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"model.{key}={value} must be positive.")
        if self.head_width is None and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ConfigError(
                f"model.width={self.width} must be an even multiple of model.heads={self.heads} (rotary pairs)."
            )
        if self.head_width is not None and self.head_width % 2:
            raise ConfigError(f"model.head_width={self.head_width} must be even (rotary pairs).")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}.")
        if self.context < 8:
            raise ConfigError(f"model.context={self.context} must be at least 8.")
        if self.shared_experts < 0 or self.dense_layers < 0:
            raise ConfigError("model.shared_experts and model.dense_layers must not be negative.")
        if self.shared_mix == SharedMix.learned and not self.shared_experts:
            raise ConfigError("model.shared_mix=learned weighs shared experts; set model.shared_experts above 0.")
        self._check_experts()

    def _check_experts(self) -> None:
        mixtures = self.moe_layers
        if not mixtures:
            raise ConfigError(
                f"model.moe_every={self.moe_every} with model.dense_layers={self.dense_layers} leaves none of "
                f"{self.layers} layers with experts."
            )
        numbers = self.experts if isinstance(self.experts, list) else [self.experts]
        # In Python a bool is an int, so `experts: true` would be one expert.
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise ConfigError(f"model.experts={self.experts} must be a whole number, or a list of them.")
        if isinstance(self.experts, list) and len(numbers) != len(mixtures):
            raise ConfigError(
                f"model.experts={self.experts} must name a number for each of the {len(mixtures)} layers with experts."
            )
        if min(numbers) < 1:
            raise ConfigError(f"model.experts={self.experts} must be at least 1.")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, without the keys of :data:`LATER` that are off."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key not in LATER}

    def effective(self) -> ModelConfig:
        """A copy with every key that has no effect at its default: equal work, equal keys."""
        if len(self.moe_layers) < self.layers:
            return self
        # No layer is dense, so nothing reads these two.
        return dataclasses.replace(self, dense_width=None, dense_activation=Activation.swiglu)

    @property
    def attention_width(self) -> int:
        """Width of an attention head."""
        return self.head_width or self.width // self.heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have a mixture of experts."""
        # `dense_layers` takes layers away and does not shift the count of `moe_every`.
        layers = range(self.dense_layers, self.layers)
        return tuple(layer for layer in layers if (layer + 1) % self.moe_every == 0)

    @property
    def experts_by_layer(self) -> tuple[int, ...]:
        """Experts of each decoder layer in the first stage; 0 for a dense one."""
        mixtures = self.moe_layers
        numbers = self.experts if isinstance(self.experts, list) else [self.experts] * len(mixtures)
        found = dict(zip(mixtures, numbers, strict=True))
        return tuple(found.get(layer, 0) for layer in range(self.layers))

    @property
    def most_experts(self) -> int:
        """Experts of the layer that has most of them in the first stage."""
        return max(self.experts_by_layer)

    @property
    def fewest_experts(self) -> int:
        """Experts of the layer with a mixture that has fewest of them in the first stage."""
        return min(n for n in self.experts_by_layer if n)
