"""Settings that several modes share, as mixins. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lifelong_moe.config.routing.base import (
    BUNDLE_CLUSTERS,
    BalanceCounts,
    BalanceOver,
    BalanceScope,
    Bundles,
    Centroids,
    RoutingConfig,
)
from lifelong_moe.config.routing.capacity import CapacityConfig, Priority
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class ChoosingConfig(RoutingConfig):
    """Modes in which tokens choose experts, or experts choose tokens."""

    top_k: int = 2
    """Experts per token. The cost of a token depends on this number, not on how many experts exist, apart from the
    router's row for each."""

    def require_top_k(self, number: int) -> None:
        """Reject any number of experts per token but the mode's own."""
        if self.top_k != number:
            raise ConfigError(
                f"routing.mode={self.mode} chooses {number} expert(s) a token: set routing.top_k={number}."
            )


@dataclass(kw_only=True)
class NoncausalConfig(RoutingConfig):
    """Modes in which later tokens change earlier ones, always or with some keys."""

    allow_noncausal: bool = False
    """Allow a router in which later tokens change earlier ones. Its losses say nothing about generated text."""


@dataclass(kw_only=True)
class CapacityKeys(NoncausalConfig):
    """Modes whose experts can have a capacity, whose order may let later tokens change earlier ones."""

    capacity: CapacityConfig | None = None
    """Capacity of each expert, a section of its own. Null: no limit, so that no token is dropped."""

    @property
    def noncausal_by(self) -> str | None:
        """The key that decides which assignments are dropped, unless earlier tokens never lose to later ones."""
        if self.capacity is None or self.capacity.is_ordered:
            return super().noncausal_by
        # Where both leak, the priority is named: another overflow alone would not help.
        key = "priority" if self.capacity.priority != Priority.token else "overflow"
        return f"routing.capacity.{key}={getattr(self.capacity, key)}"

    @property
    def varies_by_process(self) -> bool:
        """A random order is each process's own."""
        return super().varies_by_process or (self.capacity is not None and self.capacity.priority == Priority.random)


@dataclass(kw_only=True)
class ZLossConfig(RoutingConfig):
    """Modes whose router has logits, whose size a loss can limit."""

    z_loss: float = 0.00025
    """Coefficient of the router z-loss, where rows are trained; summed over layers, 0 turns it off. 0.00025 equals
    0.001 for a loss that is averaged over four layers."""


@dataclass(kw_only=True)
class BalancedConfig(ChoosingConfig):
    """Modes whose loads can be uneven, so that a loss can balance them."""

    balance_loss: float = 0.0025
    """Coefficient of the load-balancing loss (1 at perfect balance), where rows are trained; 0 turns it off. Losses of
    routers are summed over layers, as most authors do; curves show their mean. Divide a coefficient that was published
    for an average by the number of layers: 0.0025 equals 0.01 averaged over the four layers of the measured runs."""
    balance_scope: BalanceScope | None = None
    """Tokens over which the load-balancing loss counts choices: each ``sequence`` (DeepSeek-V3), a ``microbatch``, or
    all micro-batches of the step so far (``global_batch``, Qwen3; only ``learned``, ``switch`` and ``gshard``). Counts
    are over all processes, whose number has no effect. Null: ``sequence`` with ``capacity``, which allows no other
    value, and ``microbatch`` without."""
    balance_over: BalanceOver = BalanceOver.all
    """Experts that the load-balancing loss spreads tokens over: ``all``, or only this stage's ``active`` ones."""

    balance_counts = BalanceCounts.all  # no key
    supports_global_batch: ClassVar[bool] = False
    """Whether choices are counted through a step's micro-batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance_scope == BalanceScope.global_batch and not self.supports_global_batch:
            raise ConfigError("routing.balance_scope=global_batch is for routing.mode=learned or switch or gshard.")
        if self.capacity is not None and self.balance_scope not in (None, BalanceScope.sequence):
            raise ConfigError(
                f"routing.balance_scope={self.balance_scope} cannot be used with routing.capacity, which counts in "
                f"each sequence, and so does balance. Leave routing.balance_scope out, or set routing.capacity=null."
            )

    @property
    def effective_balance_scope(self) -> BalanceScope:
        """``balance_scope``, or its default: where capacity is counted if there is one."""
        return self.balance_scope or self._implied_scope

    @property
    def _implied_scope(self) -> BalanceScope:
        return BalanceScope.microbatch if self.capacity is None else BalanceScope.sequence

    def idle_keys(self) -> set[str]:
        """Also the keys of a loss that is off, and a scope that equals the default."""
        idle = super().idle_keys()
        if not self.balance_loss:
            return idle | {"balance_counts", "balance_scope", "balance_over"}
        return idle | {"balance_scope"} if self.balance_scope == self._implied_scope else idle


@dataclass(kw_only=True)
class CountsConfig(BalancedConfig):
    """Modes in which tokens choose several experts, and balance may count the first choice alone."""

    balance_counts: BalanceCounts = BalanceCounts.all
    """Choices that the load-balancing loss counts: ``all``, or only the ``first`` of each token (GShard). With
    ``bias_rate`` or ``expert_groups``, ``learned`` counts the choices that scores alone would make among all experts
    (DeepSeek-V3)."""


@dataclass(kw_only=True)
class GroupsConfig(ChoosingConfig):
    """Modes whose experts form groups, of which a token uses some."""

    expert_groups: int = 1
    """Number of groups that the experts form. ``learned``: a token uses the best ``top_groups`` of them (DeepSeek-V3);
    1 is no grouping. ``hierarchical``: each group has a gate of its own; the experts of a later stage form as many
    groups, or fewer if a group would have fewer experts than a token uses of it."""
    top_groups: int = 1
    """Number of groups that a token uses; at least two for ``hierarchical``, with at least two experts of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_groups <= self.expert_groups:
            raise ConfigError(
                f"routing.top_groups={self.top_groups} must lie in 1 to routing.expert_groups={self.expert_groups}."
            )


@dataclass(kw_only=True)
class TextClusterConfig(ChoosingConfig):
    """Modes that may cluster text: with ``bundles=cluster``, or ``cluster`` itself."""

    mixture: MixtureConfig | None = field(default_factory=MixtureConfig)
    """``bundles=cluster``: how generations predict together, a section of its own. Null: one generation is selected for
    each chunk of a text."""
    margin: float = 4.0
    """``bundles=cluster``: nats by which a newer generation must explain the preceding text better than an older one to
    be selected."""
    centroids: Centroids = Centroids.fitted
    """``fitted`` to the text, or ``random`` as a baseline: random directions for tokens, a hash of the first chunk for
    documents."""
    clusters: int | None = None
    """Clusters of text per stage. Null: with ``level=document``, as many as have ``top_k`` experts each; with
    ``bundles=cluster``, 8 per generation."""
    chunk_tokens: int = 64
    """``level=document`` and ``bundles=cluster``: tokens per chunk; a chunk has one assignment, which depends on the
    tokens before it."""
    feature_width: int = 64
    """Dimensions that the SVD keeps of ``embedding`` and tf-idf features."""

    supports_bundles: ClassVar[bool] = True

    @property
    def mixes(self) -> bool:
        """Whether generations predict together. A hash of the text, the baseline of FAISS, selects one."""
        is_selected = self.bundles == Bundles.cluster and self.centroids == Centroids.fitted
        return is_selected and self.mixture is not None

    def num_clusters(self, num_experts: int) -> int:
        """Number of clusters of text in a generation of ``num_experts`` experts, where :attr:`by_document` holds."""
        # Without bundles a cluster owns as many experts as a token uses, so that all of them run.
        default = BUNDLE_CLUSTERS if self.by_generation else max(1, num_experts // self.top_k)
        return self.clusters or default

    def idle_keys(self) -> set[str]:
        """Also the keys of clusters of text where there are none, and of fitting where they are drawn."""
        idle = super().idle_keys() | (set() if self.bundles == Bundles.cluster else {"margin"})
        idle |= set() if self.mixes else {"mixture"}
        if not self.by_document:
            return idle | {"centroids", "clusters", "chunk_tokens", "feature_width"}
        # Random clusters are hashes: no features, hence no width.
        return idle if self.centroids == Centroids.fitted else idle | {"feature_width"}


def require_multiple(num_experts: int, groups: int, key: str) -> None:
    """Reject a number of experts that is not a multiple of the number of groups."""
    if num_experts % groups:
        raise ConfigError(f"{key}={num_experts} must be a multiple of routing.expert_groups={groups}.")
