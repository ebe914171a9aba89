"""Settings of all other routers: noisy and hierarchical, dense, balanced by themselves, and not trained."""

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
    """Noise in training, under which experts have expected loads."""

    balance_loss: float = 0.0
    z_loss: float = 0.0
    # Shazeer et al., appendix C.1: w_importance = w_load = 0.1.
    importance_loss: float = 0.1
    """Coefficient of the squared coefficient of variation of what experts' gates sum to: ``noisy_topk``, of the chosen
    experts' gates; ``vmoe``, of all gates without noise, in each sequence. Summed over layers."""
    load_loss: float = 0.1
    """The same of experts' expected loads, were their noise drawn again."""
    draws_per_process: ClassVar[bool] = True


@dataclass(kw_only=True)
class NoisyConfig(LoadConfig):
    """``routing.mode=noisy_topk``."""

    mode: str = "noisy_topk"

    def require_gate_gradient(self) -> None:
        """The softmax is over the chosen."""
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
        """How many groups a generation of ``num_experts`` experts forms: each has what a token uses."""
        return min(self.expert_groups, num_experts // self.experts_per_group)

    def require_gate_gradient(self) -> None:
        """Both gates are softmaxes over what they chose."""
        if min(self.top_groups, self.experts_per_group) < 2:
            raise ConfigError(
                f"routing.top_k={self.top_k} with routing.top_groups={self.top_groups}: a gate of a hierarchy that "
                f"chooses one weighs it 1 and learns nothing. Set top_groups=2 and top_k=4 at least: two groups, and "
                f"two experts in each."
            )

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """As many groups as are asked for at first, and later as many as have what a token uses."""
        groups, least = self.expert_groups if is_first else self.groups_of(num_experts), self.experts_per_group
        if num_experts < least * max(1, groups) or num_experts % groups:
            raise ConfigError(
                f"{key}={num_experts} must be a multiple of {max(1, groups)} group(s) of at least {least} experts "
                f"(routing.expert_groups, and routing.top_k / routing.top_groups)."
            )


UNBALANCED: dict[str, Any] = {"renormalize": False, "balance_loss": 0.0}
"""What stages say of modes whose loads are even by themselves."""


@dataclass(kw_only=True)
class DenseConfig(ZLossConfig):
    """``routing.mode=dense``."""

    mode: str = "dense"
    z_loss: float = 0.0
    competitive: bool = False
    """In the last layer each expert predicts by itself, and the prediction is their mixture (Jacobs: experts
    compete), in place of the prediction from their outputs' sum (they cooperate)."""
    stored: ClassVar[dict[str, Any]] = UNBALANCED


@dataclass(kw_only=True)
class ReluConfig(ZLossConfig, BalancedConfig):
    """``routing.mode=relu``; ``top_k`` of them are used on average."""

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
    """``routing.mode=expert_choice``; a token gets ``top_k`` on average."""

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
    """Has no use in a run: Soft MoE's slots of each expert, in an encoder of your own."""
    # Each slot mixes all tokens of a sequence.
    is_noncausal: ClassVar[bool] = True


@dataclass(kw_only=True)
class ClusterConfig(TextClusterConfig):
    """``routing.mode=cluster``."""

    mode: str = "cluster"
    level: Level = Level.token
    """``cluster`` only: one assignment a ``token``, or one a chunk of a ``document``."""
    features: Features = Features.embedding
    """Token-level clusters: of a frozen token ``embedding`` (drift-free) or of the layer's ``hidden`` input."""
    scale: float = 10.0
    """Token-level clusters: gate weights are ``softmax(scale * x.c)`` over the chosen unit-length centroids."""
    sample_tokens: int = 32_768
    """Training tokens that centroids are fitted on."""
    # Centroids are fitted, never trained.
    has_rows: ClassVar[bool] = False

    def _check_bundles(self) -> None:
        if not self.clusters_embedding:
            super()._check_bundles()

    @property
    def by_document(self) -> bool:
        """Also by clusters of documents."""
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
        """Whether those of the layer's input do."""
        return self.level == Level.token and self.features == Features.hidden

    def idle_keys(self) -> set[str]:
        """Of clusters of tokens and those of documents what the other kind reads."""
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
    """Experts by a fixed pseudo-random order for each token id (``random``), or by a table made of the first
    stage's text: ``balanced``, the most frequent token id to the expert with least text so far, or ``clustered``, by
    FAISS clusters of token embeddings."""
    expert_groups: int = 1
    """A token uses one expert of each group, at weight 1 (MultiHash)."""
    feature_width: int = 64
    """``table=clustered``: dimensions kept by the SVD behind token embeddings."""
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
        """Groups of one size."""
        require_multiple(num_experts, self.expert_groups, key)

    @property
    def has_table(self) -> bool:
        """Unless ids are hashed."""
        return self.table != HashTable.random

    @property
    def fixed_by(self) -> str | None:
        """A table is made for a number of experts."""
        return f"routing.table={self.table}" if self.has_table else None

    def idle_keys(self) -> set[str]:
        """Dimensions of embeddings that nobody clusters."""
        return super().idle_keys() | (set() if self.table == HashTable.clustered else {"feature_width"})
