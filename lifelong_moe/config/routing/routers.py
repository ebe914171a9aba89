"""Settings of the routers not in ``topk.py``: noisy, hierarchical, dense, balanced, untrained. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lifelong_moe.config.routing.base import Features, HashTable, Level
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Priority, Rounding
from lifelong_moe.config.routing.shared import (
    BalancedConfig,
    CapacityKeys,
    ChoosingConfig,
    CountsConfig,
    GroupsConfig,
    NoncausalConfig,
    TextClusterConfig,
    ZLossConfig,
    require_multiple,
)
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class LoadConfig(ZLossConfig, CountsConfig):
    """Modes with noise in training, under which each expert has an expected load."""

    balance_loss: float = 0.0
    z_loss: float = 0.0
    # Shazeer et al., appendix C.1: w_importance = w_load = 0.1.
    importance_loss: float = 0.1
    """Coefficient of the squared coefficient of variation of the experts' gate sums: ``noisy_topk`` sums the chosen
    experts' gates, ``vmoe`` all gates without noise within each sequence. Losses are summed over layers; 0 is off."""
    load_loss: float = 0.1
    """Coefficient of the same loss on experts' expected loads, the expectation over new noise; 0 turns it off."""
    draws_per_process: ClassVar[bool] = True


@dataclass(kw_only=True)
class NoisyConfig(LoadConfig):
    """``routing.mode=noisy_topk``."""

    mode: str = "noisy_topk"

    def require_gate_gradient(self) -> None:
        """Reject one chosen expert, since the softmax is over the chosen ones."""
        if self.top_k == 1:
            raise ConfigError(
                f"routing.mode={self.mode} with routing.top_k=1 makes every gate weight 1, so the router gets no "
                f"gradient. Set routing.top_k=2."
            )


@dataclass(kw_only=True)
class VMoEConfig(CapacityKeys, LoadConfig):
    """``routing.mode=vmoe``."""

    mode: str = "vmoe"
    # V-MoE: 0.01 on the mean of both losses.
    importance_loss: float = 0.005
    load_loss: float = 0.005
    capacity: CapacityConfig | None = field(
        default_factory=lambda: CapacityConfig(
            # V-MoE: C = 1.05.
            factor=1.05,
            eval_factor=1.05,
            counts=Counts.assignments,
            rounding=Rounding.up,
            multiple=4,
            priority=Priority.batch,
        )
    )


@dataclass(kw_only=True)
class HierarchicalConfig(GroupsConfig, CountsConfig):
    """``routing.mode=hierarchical``. Its logits are logarithms of probabilities, which have no use for a z-loss."""

    mode: str = "hierarchical"
    # Shazeer et al., appendix C.1: two groups, and two experts of each.
    top_k: int = 4
    expert_groups: int = 2
    top_groups: int = 2
    stored: ClassVar[dict[str, Any]] = {"renormalize": False, "z_loss": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k % self.top_groups:
            raise ConfigError(
                f"routing.top_k={self.top_k} must be a multiple of routing.top_groups={self.top_groups}: each group "
                f"gives as many experts."
            )

    @property
    def experts_per_group(self) -> int:
        """Experts that a chosen group gives to a token."""
        return self.top_k // self.top_groups

    def groups_of(self, num_experts: int) -> int:
        """Number of groups in a generation of ``num_experts`` experts; each group has as many as a token uses of it."""
        return min(self.expert_groups, num_experts // self.experts_per_group)

    def require_gate_gradient(self) -> None:
        """Reject a gate that chooses one, since both gates are softmaxes over their choices."""
        if min(self.top_groups, self.experts_per_group) < 2:
            raise ConfigError(
                f"routing.top_k={self.top_k} with routing.top_groups={self.top_groups}: a gate of a hierarchy that "
                f"chooses one weighs it 1 and learns nothing. Set top_groups=2 and top_k=4 at least: two groups, and "
                f"two experts in each."
            )

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """Require the configured groups in the first stage, and later as many as have enough experts for a token."""
        groups, least = self.expert_groups if is_first else self.groups_of(num_experts), self.experts_per_group
        if num_experts < least * max(1, groups) or num_experts % groups:
            raise ConfigError(
                f"{key}={num_experts} must be a multiple of {max(1, groups)} group(s) of at least {least} experts "
                f"(routing.expert_groups, and routing.top_k / routing.top_groups)."
            )


UNBALANCED: dict[str, Any] = {"renormalize": False, "balance_loss": 0.0}
"""Recorded values of modes whose loads are even by design."""


@dataclass(kw_only=True)
class DenseConfig(ZLossConfig):
    """``routing.mode=dense``."""

    mode: str = "dense"
    z_loss: float = 0.0
    competitive: bool = False
    """If true, each expert of the last layer predicts by itself, and the model's prediction is the mixture of theirs
    (Jacobs: experts compete). If false, it predicts from the sum of their outputs (experts cooperate)."""
    stored: ClassVar[dict[str, Any]] = UNBALANCED


@dataclass(kw_only=True)
class ReluConfig(ZLossConfig, BalancedConfig):
    """``routing.mode=relu``; a token uses ``top_k`` experts on average."""

    mode: str = "relu"
    balance_loss: float = 0.0
    z_loss: float = 0.0


@dataclass(kw_only=True)
class BaseConfig(ZLossConfig, NoncausalConfig, ChoosingConfig):
    """``routing.mode=base``."""

    mode: str = "base"
    top_k: int = 1
    z_loss: float = 0.0
    # Tokens compete for equal places.
    is_noncausal: ClassVar[bool] = True
    # The assignment is over the micro-batch of each process by itself.
    draws_per_process: ClassVar[bool] = True
    stored: ClassVar[dict[str, Any]] = UNBALANCED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(1)


@dataclass(kw_only=True)
class ExpertChoiceConfig(ZLossConfig, NoncausalConfig, ChoosingConfig):
    """``routing.mode=expert_choice``; a token gets ``top_k`` experts on average."""

    mode: str = "expert_choice"
    z_loss: float = 0.0
    # Each expert ranks all tokens of a sequence.
    is_noncausal: ClassVar[bool] = True
    stored: ClassVar[dict[str, Any]] = UNBALANCED


@dataclass(kw_only=True)
class SoftConfig(NoncausalConfig):
    """``routing.mode=soft``, which no run can have."""

    mode: str = "soft"
    slots: int = 1
    """Slots per expert of Soft MoE, in an encoder of your own; runs cannot use this mode."""
    # Each slot mixes all tokens of a sequence.
    is_noncausal: ClassVar[bool] = True


@dataclass(kw_only=True)
class ClusterConfig(TextClusterConfig):
    """``routing.mode=cluster``."""

    mode: str = "cluster"
    level: Level = Level.token
    """One assignment per ``token``, or one per chunk of a ``document``."""
    features: Features = Features.embedding
    """``level=token``: cluster a frozen token ``embedding``, which never drifts, or the layer's ``hidden`` input."""
    scale: float = 10.0
    """``level=token``: gate weights are ``softmax(scale * x.c)`` over the chosen unit-length centroids ``c``."""
    sample_tokens: int = 32_768
    """``level=token``: training tokens on which centroids are fitted."""
    # Centroids are fitted, never trained.
    has_rows: ClassVar[bool] = False

    def _check_bundles(self) -> None:
        if not self.clusters_embedding:
            super()._check_bundles()

    @property
    def by_document(self) -> bool:
        """Also true for clusters of documents."""
        return super().by_document or self.level == Level.document

    @property
    def is_clustered(self) -> bool:
        """Always."""
        return True

    @property
    def clusters_embedding(self) -> bool:
        """Whether centroids of the frozen token embedding choose the experts."""
        return self.level == Level.token and self.features == Features.embedding

    @property
    def clusters_hidden(self) -> bool:
        """Whether centroids of the layer's input choose the experts."""
        return self.level == Level.token and self.features == Features.hidden

    def idle_keys(self) -> set[str]:
        """For clusters of tokens, the keys that only clusters of documents read, and the other way round."""
        idle = super().idle_keys()
        if self.level == Level.document:
            return idle | {"features", "scale", "sample_tokens"}
        # Centroids of tokens may be random too, so that key counts here.
        return idle - {"centroids"} - ({"feature_width"} if self.clusters_embedding else set())


@dataclass(kw_only=True)
class LabelConfig(ChoosingConfig):
    """``routing.mode=label``."""

    mode: str = "label"
    supports_bundles: ClassVar[bool] = True
    has_rows: ClassVar[bool] = False

    @property
    def by_label(self) -> bool:
        """Always."""
        return True

    @property
    def by_generation(self) -> bool:
        """Always: a label names the stage that learned it."""
        return True


@dataclass(kw_only=True)
class HashConfig(ChoosingConfig):
    """``routing.mode=hash``."""

    mode: str = "hash"
    table: HashTable = HashTable.random
    """``random``: a fixed pseudo-random order of experts for each token id. The others are tables made from the first
    stage's text: ``balanced`` assigns token ids, most frequent first, to the expert with the least text so far;
    ``clustered`` assigns them by FAISS clusters of token embeddings."""
    expert_groups: int = 1
    """Number of groups of experts; a token uses one expert of each, with gate weight 1 (MultiHash). 1: no groups."""
    feature_width: int = 64
    """``table=clustered``: dimensions of the token embeddings, which an SVD gives."""
    has_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_groups > 1 and self.top_k != self.expert_groups:
            raise ConfigError(
                f"routing.top_k={self.top_k} must be routing.expert_groups={self.expert_groups}: one expert of each."
            )
        if self.has_table and self.top_k > 1:
            raise ConfigError(f"routing.table={self.table} gives each token id one expert: set routing.top_k=1.")

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """Require groups of one size."""
        require_multiple(num_experts, self.expert_groups, key)

    @property
    def has_table(self) -> bool:
        """True unless ids are hashed."""
        return self.table != HashTable.random

    @property
    def fixed_by(self) -> str | None:
        """The table, which is made for a fixed number of experts."""
        return f"routing.table={self.table}" if self.has_table else None

    def idle_keys(self) -> set[str]:
        """Also the dimensions of embeddings where none are clustered."""
        return super().idle_keys() | (set() if self.table == HashTable.clustered else {"feature_width"})
