"""Settings of routing that all modes have in common. Torch-free.

A mode's settings are a subclass (``routers.py``, ``topk.py``), and groups of keys that some modes share are mixins
(``shared.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self, cast

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.errors import ConfigError

BALANCE_KEYS = ("balance_loss", "balance_counts", "balance_scope", "balance_over")
LOSS_KEYS = (*BALANCE_KEYS, "importance_loss", "load_loss", "z_loss")
"""Keys that affect a router's losses but not its choices."""

BUNDLE_CLUSTERS = 8
"""Default number of centroids per generation with ``routing.bundles=cluster``."""


class Level(StrEnum):
    """What FAISS clusters: tokens or documents."""

    token = "token"
    document = "document"


class Features(StrEnum):
    """Vectors that token-level clusters are computed from."""

    embedding = "embedding"
    hidden = "hidden"


class Bundles(StrEnum):
    """How a token is assigned to the generation (experts, router rows, trunk deltas) of one stage."""

    none = "none"
    cluster = "cluster"
    label = "label"


class Centroids(StrEnum):
    """Whether centroids are fitted or drawn at random."""

    fitted = "fitted"
    random = "random"


class BalanceOver(StrEnum):
    """Which experts the load-balancing loss spreads tokens over."""

    all = "all"
    active = "active"


class Score(StrEnum):
    """The function from logits to scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class BalanceCounts(StrEnum):
    """Which choices the load-balancing loss counts."""

    all = "all"
    first = "first"


class BalanceScope(StrEnum):
    """Over which tokens the load-balancing loss counts choices."""

    sequence = "sequence"
    microbatch = "microbatch"
    global_batch = "global_batch"


class SecondExpert(StrEnum):
    """When GShard's second expert is used in training."""

    all = "all"
    threshold = "threshold"
    random = "random"


class HashTable(StrEnum):
    """How ``hash`` maps token ids to experts."""

    random = "random"
    balanced = "balanced"
    clustered = "clustered"


# Stage keys are hashes of this form. A new key belongs to the stages of its own mode alone: one more entry here would
# change the key of every stage that exists.
STORED: dict[str, Any] = {
    "mode": "learned",
    "top_k": 2,
    "renormalize": True,
    "score": Score.softmax,
    "gate_scale": 1.0,
    "bias_rate": 0.0,
    "expert_groups": 1,
    "top_groups": 1,
    "jitter": 0.0,
    "competitive": False,
    "table": HashTable.random,
    "slots": 1,
    "second": SecondExpert.all,
    "capacity": None,
    "allow_noncausal": False,
    "balance_loss": 0.0025,
    "balance_counts": BalanceCounts.all,
    "balance_scope": None,
    "importance_loss": 0.0,
    "load_loss": 0.0,
    "balance_over": BalanceOver.all,
    "z_loss": 0.00025,
    "bundles": Bundles.none,
    "margin": 4.0,
    "level": Level.token,
    "features": Features.embedding,
    "feature_width": 64,
    "scale": 10.0,
    "centroids": Centroids.fitted,
    "clusters": None,
    "chunk_tokens": 64,
    "sample_tokens": 32_768,
    "options": {},
}
"""Values that stages and their keys record for every mode, even for keys that it lacks."""
ABSENT: dict[str, Any] = {"mixture": None}
"""Values of keys that are recorded only where they differ: stages of earlier versions lack them."""

# 0 switches each of these off.
NOT_NEGATIVE = ("balance_loss", "z_loss", "margin", "importance_loss", "load_loss", "bias_rate", "jitter")
POSITIVE = ("scale", "chunk_tokens", "sample_tokens", "feature_width", "gate_scale", "expert_groups", "slots")
AT_LEAST_ONE = ("top_k", "clusters")


@dataclass(kw_only=True)
class RoutingConfig:
    """How tokens are routed to experts; fixed for the whole run. ``routing.mode`` decides which keys exist."""

    mode: str = "learned"
    """``learned`` (trained top-k: Mixtral, DeepSeek and most others), ``switch``, ``gshard``, ``noisy_topk``, ``vmoe``,
    ``hierarchical``, ``dense`` (Jacobs), ``relu`` (ReMoE), ``base``, ``expert_choice``, ``cluster`` (FAISS, never
    trained), ``label`` (by the known distribution), ``hash`` (by token id, never trained), or the dotted path of a
    ``Router`` subclass of your own. Keys that are not set get the values of the mode's authors: docs/systems.md."""
    bundles: Bundles = Bundles.none
    """Restrict each token to the generation of one stage, within which ``learned`` or ``cluster`` (token level) chooses
    experts. ``cluster``: FAISS selects the generation from the preceding text, chunk by chunk. ``label``: the known
    distribution selects it. ``none``: a token may use all experts."""

    # Not annotated, hence no keys: values that hold in modes without such a key, so that callers need not ask the mode.
    top_k = 2
    expert_groups = 1
    allow_noncausal = False
    competitive = False
    margin = 4.0
    chunk_tokens = 64
    sample_tokens = 32_768
    mixture = cast("MixtureConfig | None", None)

    # Class variables are facts about a mode, not keys: no configuration sets them.
    supports_bundles: ClassVar[bool] = False
    """Whether tokens can be restricted to the generation of one stage."""
    has_rows: ClassVar[bool] = True
    """Whether the router has trained rows, one per expert."""
    is_noncausal: ClassVar[bool] = False
    """Whether later tokens change earlier ones under any keys, in training or always."""
    draws_per_process: ClassVar[bool] = False
    """Whether, under any keys, each process draws random numbers or assigns all of its tokens at once."""
    stored: ClassVar[dict[str, Any]] = {"renormalize": False}
    """Recorded values of keys that the mode lacks, where they differ from ``STORED``."""

    def __post_init__(self) -> None:
        require_bounded(self, "routing.")
        # A mode has only some of the keys that the three tuples name.
        for key, value in self.settings().items():
            if key in NOT_NEGATIVE and value < 0:
                raise ConfigError(f"routing.{key}={value} must not be negative.")
            if key in POSITIVE and value <= 0:
                raise ConfigError(f"routing.{key}={value} must be positive.")
            if key in AT_LEAST_ONE and value is not None and value < 1:
                raise ConfigError(f"routing.{key}={value} must be at least 1.")
        if self.bundles != Bundles.none:
            self._check_bundles()

    def _check_bundles(self) -> None:
        raise ConfigError(
            f"routing.bundles={self.bundles} needs routing.mode=learned, or cluster with level=token and "
            f"features=embedding; got routing.mode={self.mode}. Set routing.bundles=none otherwise."
        )

    def require_gate_gradient(self) -> None:
        """Reject, in a new run, a softmax over a single chosen expert: its weight is 1 and its gradient 0.

        Source:
            Sparsely-gated mixture of experts (arXiv:1701.06538), section 2.1: gates have gradients where k > 1.
        """

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """Reject experts that do not form the configured groups, and groups of fewer experts than a token uses.

        Args:
            num_experts: Experts of a generation in one layer.
            key: Configuration key that sets their number.
            is_first: Whether it is the first generation.
        """

    @property
    def capacity(self) -> CapacityConfig | None:
        """Capacity of each expert; None means no limit, so that no token is dropped."""
        return None

    @property
    def noncausal_by(self) -> str | None:
        """The setting that lets later tokens change earlier ones, at least under full load; None if none does."""
        return f"routing.mode={self.mode}" if self.is_noncausal else None

    @property
    def has_table(self) -> bool:
        """Whether a table from token ids to experts is fitted before training."""
        return False

    @property
    def fixed_by(self) -> str | None:
        """The setting that fixes the number of experts; None if it can grow."""
        return None

    @property
    def varies_by_process(self) -> bool:
        """Whether the number of processes changes what is learned."""
        return self.draws_per_process

    @property
    def by_label(self) -> bool:
        """Whether a token's domain is the known distribution of its text."""
        return self.bundles == Bundles.label

    @property
    def by_document(self) -> bool:
        """Whether a token's domain is decided from the preceding text, a chunk at a time."""
        return self.bundles == Bundles.cluster

    @property
    def mixes(self) -> bool:
        """Whether the generations of a model predict together, see :mod:`.mixture`."""
        return False

    @property
    def is_clustered(self) -> bool:
        """Whether a stage fits centroids, or a table, before it trains."""
        return self.by_document or self.has_table

    @property
    def clusters_hidden(self) -> bool:
        """Whether centroids of hidden states choose the experts; hidden states have to be learned first."""
        return False

    @property
    def by_generation(self) -> bool:
        """Whether a token's domain is the generation whose experts and deltas it uses."""
        return self.bundles != Bundles.none

    def effective(self, *, grown: bool) -> RoutingConfig:
        """A copy with every key that has no effect at its default: equal work, equal keys.

        Args:
            grown: Whether the model has experts of more than one stage.
        """
        # In a model of one generation nothing is left to choose between.
        found = self if grown else self.with_keys({"bundles", "balance_over"}, STORED)
        found = found.with_keys(found.idle_keys(), STORED | ABSENT)
        # A permission, where one is needed.
        return found.with_keys({"allow_noncausal"}, {"allow_noncausal": self.noncausal_by is not None})

    def idle_keys(self) -> set[str]:
        """Keys without effect, given the values of the others."""
        return set()

    def with_losses_of(self, other: RoutingConfig) -> RoutingConfig:
        """A copy with another section's losses if it chooses alike: losses are a stage's own, the rest its parent's."""
        if (self.mode, self.capacity) != (other.mode, other.capacity):
            return self
        return self.with_keys(LOSS_KEYS, other.settings())

    def with_keys(self, keys: Iterable[str], values: Mapping[str, Any]) -> Self:
        """A copy with these values, for those of the keys that this mode has."""
        return dataclasses.replace(self, **{key: values[key] for key in keys if key in self.settings()})

    def settings(self) -> Mapping[str, Any]:
        """Keys and values of this section, shallow."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data in one flat form for all modes; read by :func:`.modes.stored_routing`."""
        written = STORED | self.stored | dataclasses.asdict(self)
        return {key: value for key, value in written.items() if key not in ABSENT or value != ABSENT[key]}
