"""Keys that several modes share, as mixins of their settings. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
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
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class ChoosingConfig(RoutingConfig):
    """Tokens choose experts, or experts tokens."""

    top_k: int = 2
    """Experts per token; so many run, however many there are, and each further one adds a row of the router."""

    def require_top_k(self, number: int) -> None:
        """Refuse another number of experts than the one that the mode has."""
        if self.top_k != number:
            raise ConfigError(
                f"routing.mode={self.mode} chooses {number} expert(s) a token: set routing.top_k={number}."
            )


@dataclass(kw_only=True)
class NoncausalConfig(RoutingConfig):
    """Later tokens change earlier ones, always or with some keys."""

    allow_noncausal: bool = False
    """Let a router be used that lets later tokens change earlier ones. Its losses say nothing about generation."""


@dataclass(kw_only=True)
class CapacityKeys(NoncausalConfig):
    """Experts may have limited room, whose order may let later tokens change earlier ones."""

    capacity: CapacityConfig | None = None
    """Room of each expert; none by default: nothing is ever dropped."""

    @property
    def noncausal_by(self) -> str | None:
        """The key that says who is served, unless earlier tokens never lose to later ones."""
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
    """The router has logits, whose size a loss can hold down."""

    z_loss: float = 0.00025
    """Coefficient of the router z-loss, where rows are trained; summed over layers. The default is 0.001 averaged over
    four."""


@dataclass(kw_only=True)
class BalancedConfig(ChoosingConfig):
    """Loads can be uneven, so that a loss can balance them."""

    balance_loss: float = 0.0025
    """Coefficient of the load-balancing loss (1 at perfect balance), where rows are trained. Losses of routers are
    summed over layers, as most authors do; curves show their mean. The default is 0.01 averaged over the four layers
    of the measured runs, and a coefficient that was published for an average is to be divided by the layers."""
    balance_scope: BalanceScope | None = None
    """Count choices in each ``sequence`` (DeepSeek-V3), in a ``microbatch``, or in all of a step's micro-batches so far
    (``global_batch``, Qwen3; ``learned``, ``switch`` and ``gshard`` alone); over all processes, whose number changes
    nothing. By default where room is counted: in each sequence with ``capacity``, which allows nothing else, and in a
    micro-batch without."""
    balance_over: BalanceOver = BalanceOver.all
    """Spread tokens over ``all`` experts or over this stage's ``active`` ones only."""

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
        """Over which tokens the load-balancing loss counts choices: where room is counted, unless there is no limit."""
        return self.balance_scope or self._implied_scope

    @property
    def _implied_scope(self) -> BalanceScope:
        return BalanceScope.microbatch if self.capacity is None else BalanceScope.sequence

    def idle_keys(self) -> set[str]:
        """What shapes a loss that is not there; and a scope that is meant anyway."""
        idle = super().idle_keys()
        if not self.balance_loss:
            return idle | {"balance_counts", "balance_scope", "balance_over"}
        return idle | {"balance_scope"} if self.balance_scope == self._implied_scope else idle


@dataclass(kw_only=True)
class CountsConfig(BalancedConfig):
    """Tokens choose several experts, and balance may look at the first choice alone."""

    balance_counts: BalanceCounts = BalanceCounts.all
    """Count ``all`` choices, or ``first`` ones only (GShard). Of ``learned`` with ``bias_rate`` or ``expert_groups``:
    those that scores alone would make among all experts (DeepSeek-V3)."""


@dataclass(kw_only=True)
class GroupsConfig(ChoosingConfig):
    """Experts form groups, of which a token uses some."""

    expert_groups: int = 1
    """``learned``: divide the experts into so many groups, of which a token uses the best ``top_groups``
    (DeepSeek-V3). ``hierarchical``: groups that the first stage's experts form, each with a gate of its own; a later
    stage's form as many, or fewer where each would have less experts than a token uses of it."""
    top_groups: int = 1
    """Groups that a token uses; ``hierarchical``: two or more, and two or more experts of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_groups <= self.expert_groups:
            raise ConfigError(
                f"routing.top_groups={self.top_groups} must lie in 1 to routing.expert_groups={self.expert_groups}."
            )


@dataclass(kw_only=True)
class TextClusterConfig(ChoosingConfig):
    """Text may be clustered: with ``bundles=cluster``, or by ``cluster`` itself."""

    margin: float = 4.0
    """``bundles=cluster``: nats by which a newer bundle must explain the text so far better than an older one."""
    centroids: Centroids = Centroids.fitted
    """``random`` is the null to compare with: random directions for tokens, a hash of the first chunk for documents."""
    clusters: int | None = None
    """Clusters a stage has, where text is clustered. The default gives each cluster of ``level=document`` ``top_k``
    experts of its own, and each bundle 8 centroids."""
    chunk_tokens: int = 64
    """Document-level, and ``bundles=cluster``: tokens that share one assignment, made from the tokens before them."""
    feature_width: int = 64
    """Dimensions kept by the SVD behind ``embedding`` and ``tfidf`` features."""

    supports_bundles: ClassVar[bool] = True

    def num_clusters(self, num_experts: int) -> int:
        """How many clusters of text a generation of ``num_experts`` experts has, where :attr:`by_document` holds."""
        # Without bundles a cluster owns as many experts as a token uses, so that all of them run.
        default = BUNDLE_CLUSTERS if self.by_generation else max(1, num_experts // self.top_k)
        return self.clusters or default

    def idle_keys(self) -> set[str]:
        """What shapes clusters of text that are not there, or that are drawn and not fitted."""
        idle = super().idle_keys() | (set() if self.bundles == Bundles.cluster else {"margin"})
        if not self.by_document:
            return idle | {"centroids", "clusters", "chunk_tokens", "feature_width"}
        # Random clusters are hashes: no features, hence no width.
        return idle if self.centroids == Centroids.fitted else idle | {"feature_width"}


def require_multiple(num_experts: int, groups: int, key: str) -> None:
    """Refuse experts that do not form so many groups of one size."""
    if num_experts % groups:
        raise ConfigError(f"{key}={num_experts} must be a multiple of routing.expert_groups={groups}.")
