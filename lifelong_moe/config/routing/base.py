"""How tokens reach experts: what all modes have in common. Torch-free.

A mode's settings are a subclass (``router_config.py``), and groups of keys that some modes share are mixins
(``shared_config.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self

from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.errors import ConfigError

LOSS_KEYS = (
    "balance_loss",
    "balance_counts",
    "balance_scope",
    "balance_over",
    "importance_loss",
    "load_loss",
    "z_loss",
)
"""What shapes a router's losses and nothing of what it answers."""

BUNDLE_CLUSTERS = 8
"""Centroids a stage of ``routing.bundles=cluster`` has by default."""


class Level(StrEnum):
    """What a FAISS cluster is a cluster of."""

    token = "token"
    document = "document"


class Features(StrEnum):
    """What token-level clusters are computed from."""

    embedding = "embedding"
    hidden = "hidden"


class Bundles(StrEnum):
    """How a token comes to the bundle (experts, router rows, trunk deltas) of one stage."""

    none = "none"
    cluster = "cluster"
    label = "label"


class Centroids(StrEnum):
    """Where centroids come from."""

    fitted = "fitted"
    random = "random"


class BalanceOver(StrEnum):
    """Which experts the load-balancing loss spreads tokens over."""

    all = "all"
    active = "active"


class Score(StrEnum):
    """What turns logits into scores."""

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
    """How ``hash`` comes from token ids to experts."""

    random = "random"
    balanced = "balanced"
    clustered = "clustered"


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
"""What stages and their keys say of all modes, whether one has the key or not. It stays as it is: a key that is new
stands in the stages of its own mode alone, and changes the keys of no other."""

NOT_NEGATIVE = ("balance_loss", "z_loss", "margin", "importance_loss", "load_loss", "bias_rate", "jitter")
POSITIVE = ("scale", "chunk_tokens", "sample_tokens", "feature_width", "gate_scale", "expert_groups", "slots")
AT_LEAST_ONE = ("top_k", "clusters")


@dataclass(kw_only=True)
class RoutingConfig:
    """How tokens reach experts; fixed for the whole run. ``routing.mode`` decides which keys there are."""

    mode: str = "learned"
    """``learned`` (trained top-k: Mixtral, DeepSeek and most others), ``switch``, ``gshard``, ``noisy_topk``, ``vmoe``,
    ``hierarchical``, ``dense`` (Jacobs), ``relu`` (ReMoE), ``base``, ``expert_choice``, ``cluster`` (FAISS, never
    trained), ``label`` (by the known distribution), ``hash`` (by token id, never trained), or the dotted path of a
    ``Router`` subclass of your own. A mode brings its authors' values for keys that are not set: docs/systems.md."""
    bundles: Bundles = Bundles.none
    """A token uses the experts of one stage alone, among which ``learned`` or ``cluster`` (token level) chooses.
    ``cluster``: FAISS picks the stage from the text so far, a chunk at a time; ``label``: by the known distribution;
    ``none``: a token may use all experts."""

    # Not annotated, hence no keys: what holds in a mode that makes no key of it, for those who ask whatever the mode.
    top_k = 2
    expert_groups = 1
    allow_noncausal = False
    competitive = False
    margin = 4.0
    chunk_tokens = 64
    sample_tokens = 32_768

    may_have_bundles: ClassVar[bool] = False
    """Whether a token can be kept to the experts of one stage."""
    has_rows: ClassVar[bool] = True
    """Whether the router has trained rows, one an expert."""
    always_leaks: ClassVar[bool] = False
    """Whether later tokens change earlier ones, in training or always, whatever the keys."""
    draws: ClassVar[bool] = False
    """Whether each process draws random numbers, or assigns its tokens all at once, whatever the keys."""
    stored: ClassVar[dict[str, Any]] = {"renormalize": False}
    """What stages say of keys that the mode does not have, where it is not as in ``STORED``."""

    def __post_init__(self) -> None:
        for key, value in self.own().items():
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

    def refuse_lone_choice(self) -> None:
        """Refuse, of a new run, a softmax over the one expert that it chose: its weight is 1, and nothing teaches it.

        Source:
            Sparsely-gated mixture of experts (arXiv:1701.06538), section 2.1: gates have gradients where k > 1.
        """

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """Refuse experts that do not form the groups that are asked for, and groups that hold less than a token uses.

        Args:
            num_experts: Of one layer, that a generation has.
            key: What sets their number.
            is_first: Whether it is the first generation.
        """

    @property
    def capacity(self) -> CapacityConfig | None:
        """Room of each expert; None: nothing is ever dropped."""
        return None

    @property
    def leaks(self) -> str | None:
        """The setting by which later tokens change earlier ones, at least where loads bind; None if they never do."""
        return f"routing.mode={self.mode}" if self.always_leaks else None

    @property
    def has_table(self) -> bool:
        """Whether a table from token ids to experts is fitted before training."""
        return False

    @property
    def is_fixed(self) -> str | None:
        """The setting by which the number of experts cannot change; None if it can."""
        return None

    @property
    def by_process(self) -> bool:
        """Whether the number of processes changes what is learned."""
        return self.draws

    @property
    def by_label(self) -> bool:
        """Whether a token's group is its text's known distribution."""
        return self.bundles == Bundles.label

    @property
    def by_document(self) -> bool:
        """Whether a token's group is decided from the text so far, a chunk at a time."""
        return self.bundles == Bundles.cluster

    @property
    def is_clustered(self) -> bool:
        """Whether a stage fits centroids, or a table, before it trains."""
        return self.by_document or self.has_table

    @property
    def clusters_hidden(self) -> bool:
        """Whether centroids of hidden states choose the experts, so that those have to be learned first."""
        return False

    @property
    def has_bundles(self) -> bool:
        """Whether a token's group names the stage whose experts and deltas it uses."""
        return self.bundles != Bundles.none

    def effective(self, *, grown: bool) -> RoutingConfig:
        """The same, with every key that changes nothing at its default: equal work, equal keys.

        Args:
            grown: Whether the model has experts of more than one stage.
        """
        found = self if grown else self.with_keys({"bundles", "balance_over"}, STORED)  # there is no choice
        found = found.with_keys(found.idle_keys(), STORED)
        # A permission, where one is needed.
        return found.with_keys({"allow_noncausal"}, {"allow_noncausal": self.leaks is not None})

    def idle_keys(self) -> set[str]:
        """Keys that change nothing beside the others."""
        return set()

    def with_losses_of(self, other: RoutingConfig) -> RoutingConfig:
        """With another one's losses, if it chooses alike: these are a stage's, all else is its parent's."""
        if (self.mode, self.capacity) != (other.mode, other.capacity):
            return self
        return self.with_keys(LOSS_KEYS, other.own())

    def with_keys(self, keys: Iterable[str], values: Mapping[str, Any]) -> Self:
        """With these values of those keys that it has."""
        return dataclasses.replace(self, **{key: values[key] for key in keys if key in self.own()})

    def own(self) -> dict[str, Any]:
        """Its keys and their values, shallow."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data: one flat form for all modes; read by :func:`.router_config.stored_routing`."""
        return STORED | self.stored | dataclasses.asdict(self)
