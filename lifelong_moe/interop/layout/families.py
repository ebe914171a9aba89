"""Architectures that we can express, each as the keys of its ``config.json`` with transformers' types and defaults.

Torch-free.

A key that changes what a model computes, and that we have no part for, has a type of one value: any other is refused
with its name. Keys that are not listed are about training, or about how a model is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lifelong_moe.config.model import ModelConfig, QKNorm, RopeScaling
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.rope import RopeKeys
from lifelong_moe.storage.plain import PlainError, from_plain


@dataclass(frozen=True, kw_only=True)
class Family:
    """A dense decoder: what all architectures have in common. Keys are named as in ``config.json``."""

    model_type: ClassVar[str]
    """Its name in ``config.json``."""
    class_name: ClassVar[str]
    """Class of transformers that runs it."""
    qk_norm: ClassVar[QKNorm] = QKNorm.none
    has_bias: ClassVar[bool] = False
    """Whether queries, keys and values have biases."""
    has_window: ClassVar[bool] = True
    """Whether its class of transformers looks at ``sliding_window``."""
    is_mixture: ClassVar[bool] = False
    network: ClassVar[str] = "mlp"
    """What a layer calls its feed-forward network, or its mixture."""
    matrices: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down matrices of an expert on disk."""
    theta: ClassVar[float] = 10_000.0
    """Rotary base where none is given."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    """Two names of one function."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_theta: float | None = None
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    quantization_config: None = None
    auto_map: None = None

    @property
    def separator(self) -> int:
        """The token that begins a document: BOS, or EOS where there is no BOS, as in Qwen's models."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        found = next((one for one in (self.bos_token_id, *ends) if one is not None), None)
        if found is None:
            raise PlainError("null, and so is eos_token_id; one of them must begin a document", ".bos_token_id")
        if not 0 <= found < self.vocab_size:
            raise PlainError(f"{found} is no token of {self.vocab_size}", ".bos_token_id")
        return found

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text, but for the one that begins a document."""
        found = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return sorted({one for one in found if one is not None and 0 <= one < self.vocab_size} - {self.separator})

    @property
    def biases(self) -> bool:
        """Whether queries, keys and values of this model have biases."""
        return self.has_bias

    @property
    def unused_width(self) -> int | None:
        """Width of a shared expert that each mixture has on disk, of zeros; None where there is none."""
        return None

    @property
    def window(self) -> int | None:
        """Tokens that a token attends to; None means all."""
        return self.sliding_window if self.has_window else None

    @property
    def rope(self) -> tuple[float, RopeScaling | None]:
        """Base and scaling of rotary positions."""
        # Transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`.
        found = self.rope_parameters or self.rope_scaling or RopeKeys()
        if 1.0 not in (self.partial_rotary_factor, found.partial_rotary_factor) or self.partial_rotary_factor != 1:
            raise PlainError("must be 1: all of a head is rotated", ".partial_rotary_factor")
        base = found.rope_theta or self.rope_theta or self.theta
        return base, found.scaling(self.max_position_embeddings)

    def model(self) -> ModelConfig:
        """The shape in our words."""
        heads, width = self.num_attention_heads, self.hidden_size
        base, scaling = self.rope
        # A width that follows from the others is left out, so that equal shapes have equal keys.
        follows = heads > 0 and width % heads == 0 and self.head_dim in (None, width // heads)
        return ModelConfig(
            layers=self.num_hidden_layers,
            width=width,
            heads=heads,
            kv_heads=heads if self.num_key_value_heads is None else self.num_key_value_heads,
            head_width=None if follows else self.head_dim,
            context=self.max_position_embeddings,
            rope_base=base,
            rope_scaling=scaling,
            norm_eps=self.rms_norm_eps,
            qk_norm=self.qk_norm,
            attention_bias=self.biases,
            window=self.window,
            tie_embeddings=self.tie_word_embeddings,
            init_std=self.initializer_range,
            **self._experts(),
        )

    def routing(self) -> LearnedConfig:
        """The router in our words. A dense model's has one expert to choose, whose weight is 1."""
        return LearnedConfig()

    def _experts(self) -> dict[str, Any]:
        """Keys of ``model`` that say what a layer has behind attention."""
        return {"expert_width": self.intermediate_size, "experts": 1}


@dataclass(frozen=True, kw_only=True)
class Llama(Family):
    """``LlamaForCausalLM``: Llama 1 to 3, SmolLM2, and others."""

    model_type: ClassVar[str] = "llama"
    class_name: ClassVar[str] = "LlamaForCausalLM"
    has_window: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Mistral(Family):
    """``MistralForCausalLM``."""

    model_type: ClassVar[str] = "mistral"
    class_name: ClassVar[str] = "MistralForCausalLM"
    num_key_value_heads: int | None = 8
    sliding_window: int | None = 4096


@dataclass(frozen=True, kw_only=True)
class Qwen2(Family):
    """``Qwen2ForCausalLM``: also Qwen2.5."""

    model_type: ClassVar[str] = "qwen2"
    class_name: ClassVar[str] = "Qwen2ForCausalLM"
    has_bias: ClassVar[bool] = True
    num_key_value_heads: int | None = 32
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    @property
    def window(self) -> int | None:
        """The window, where layers have one."""
        if not self.use_sliding_window or self.sliding_window is None:
            return None
        layers = range(self.num_hidden_layers)
        kinds = self.layer_types or ["full" if i < self.max_window_layers else "sliding_attention" for i in layers]
        slides = {kind == "sliding_attention" for kind in kinds}
        if len(slides) > 1:
            raise PlainError("some layers have a window and others none; all must be alike", ".use_sliding_window")
        return self.sliding_window if slides == {True} else None


@dataclass(frozen=True, kw_only=True)
class Qwen3(Qwen2):
    """``Qwen3ForCausalLM``."""

    model_type: ClassVar[str] = "qwen3"
    class_name: ClassVar[str] = "Qwen3ForCausalLM"
    has_bias: ClassVar[bool] = False
    qk_norm: ClassVar[QKNorm] = QKNorm.head
    head_dim: int | None = 128


@dataclass(frozen=True, kw_only=True)
class Mixture(Family):
    """A decoder whose layers have mixtures of experts."""

    is_mixture: ClassVar[bool] = True
    num_local_experts: int | None = None
    num_experts: int | None = None
    """The other name of ``num_local_experts``: transformers 5 writes either, and older files the one of their class."""
    num_experts_per_tok: int
    norm_topk_prob: bool = False

    @property
    def experts(self) -> int:
        """Experts of a layer that has a mixture."""
        # No default, whatever the class's is: a name that we do not know would hide the number.
        if (found := self.num_experts if self.num_local_experts is None else self.num_local_experts) is None:
            raise PlainError("missing", ".num_experts")
        return found

    def routing(self) -> LearnedConfig:
        """Gates as the softmax over all experts gives them, unless they are to sum to 1."""
        top_k = self.num_experts_per_tok
        if top_k > self.experts:
            raise PlainError(f"must be at most {self.experts}, not {top_k}", ".num_experts_per_tok")
        if top_k == 1 and self.norm_topk_prob:
            reason = "1, and gates that sum to 1 are then all 1: the router gets no gradient; at least 2 are needed"
            raise PlainError(reason, ".num_experts_per_tok")
        return LearnedConfig(top_k=top_k, renormalize=self.norm_topk_prob)

    def _experts(self) -> dict[str, Any]:
        return {"expert_width": self.intermediate_size, "experts": self.experts}


@dataclass(frozen=True, kw_only=True)
class Mixtral(Mixture):
    """``MixtralForCausalLM``."""

    model_type: ClassVar[str] = "mixtral"
    class_name: ClassVar[str] = "MixtralForCausalLM"
    network: ClassVar[str] = "block_sparse_moe"
    matrices: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    theta: ClassVar[float] = 1_000_000.0
    num_key_value_heads: int | None = 8
    rms_norm_eps: float = 1e-5
    norm_topk_prob: Literal[True] = True
    """Not in its files: the gates of the chosen experts always sum to 1."""


@dataclass(frozen=True, kw_only=True)
class Olmoe(Mixture):
    """``OlmoeForCausalLM``."""

    model_type: ClassVar[str] = "olmoe"
    class_name: ClassVar[str] = "OlmoeForCausalLM"
    has_window: ClassVar[bool] = False
    qk_norm: ClassVar[QKNorm] = QKNorm.full
    rms_norm_eps: float = 1e-5
    sliding_window: None = None
    clip_qkv: float | None = None

    def _experts(self) -> dict[str, Any]:
        return super()._experts() | {"qkv_clip": self.clip_qkv}


@dataclass(frozen=True, kw_only=True)
class QwenMixture(Mixture):
    """What Qwen's mixtures have in common."""

    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    moe_intermediate_size: int
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None

    def _experts(self) -> dict[str, Any]:
        dense = sorted(set(self.mlp_only_layers or ()) & set(range(self.num_hidden_layers)))
        # Ours are the lowest ones, and all between every so many.
        if dense != list(range(len(dense))):
            raise PlainError(f"must be the lowest layers, not {self.mlp_only_layers}", ".mlp_only_layers")
        return {
            "expert_width": self.moe_intermediate_size,
            "experts": self.experts,
            "dense_width": self.intermediate_size,
            "dense_layers": len(dense),
            "moe_every": self.decoder_sparse_step,
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(QwenMixture):
    """``Qwen3MoeForCausalLM``."""

    model_type: ClassVar[str] = "qwen3_moe"
    class_name: ClassVar[str] = "Qwen3MoeForCausalLM"
    qk_norm: ClassVar[QKNorm] = QKNorm.head
    num_key_value_heads: int | None = 4

    @property
    def window(self) -> int | None:
        """The window, if it is in use."""
        return self.sliding_window if self.use_sliding_window else None


@dataclass(frozen=True, kw_only=True)
class Qwen2Moe(QwenMixture):
    """``Qwen2MoeForCausalLM`` whose shared experts are zeros: mixtures grown from Qwen2, and of un-normalized gates."""

    model_type: ClassVar[str] = "qwen2_moe"
    class_name: ClassVar[str] = "Qwen2MoeForCausalLM"
    num_key_value_heads: int | None = 16
    shared_expert_intermediate_size: int = 5632
    qkv_bias: bool = True
    layer_types: list[str] | None = None

    @property
    def biases(self) -> bool:
        """As the file says."""
        return self.qkv_bias

    @property
    def unused_width(self) -> int | None:
        """Its class always adds a shared expert, of which ours have none."""
        return self.shared_expert_intermediate_size

    @property
    def window(self) -> int | None:
        """The window, if all layers have it; by default every second one does."""
        if not self.use_sliding_window or self.sliding_window is None:
            return None
        kinds = self.layer_types
        if kinds is None or len(kinds) != self.num_hidden_layers or set(kinds) != {"sliding_attention"}:
            raise PlainError("some layers have a window and others none; all must be alike", ".use_sliding_window")
        return self.sliding_window


FAMILIES: Mapping[str, type[Family]] = {
    one.model_type: one for one in (Llama, Mistral, Qwen2, Qwen3, Mixtral, Olmoe, Qwen3Moe, Qwen2Moe)
}
"""By ``model_type``."""


def read_family(config: Mapping[str, Any], source: str) -> Family:
    """The architecture of a ``config.json``.

    Args:
        config: Its content.
        source: What messages call it.

    Raises:
        ConfigError: If we cannot express it; names the key, and its value.
    """
    kind = FAMILIES.get(str(config.get("model_type")))
    if kind is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{source}: model_type={config.get('model_type')} is not supported; there are {known}.")
    known_keys = {field.name for field in dataclasses.fields(kind)}
    try:
        family = from_plain(kind, {key: value for key, value in config.items() if key in known_keys})
        # Asked here, so that what they refuse is refused where the file is read.
        _ = family.model(), family.routing(), family.separator
    except (PlainError, ConfigError) as error:
        text = str(error)
        raise ConfigError(f"{source}: {text}{'' if text.endswith('.') else '.'}") from None
    return family
