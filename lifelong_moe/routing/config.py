"""How tokens reach experts. Torch-free; the registry names routers by dotted path and imports them on use."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lifelong_moe.errors import ConfigError

ROUTERS = {
    "learned": "lifelong_moe.routing.learned.LearnedRouter",
    "cluster": "lifelong_moe.routing.cluster.build_cluster_router",
    "label": "lifelong_moe.routing.group.LabelRouter",
    "hash": "lifelong_moe.routing.hashing.HashRouter",
}
"""``routing.mode`` → dotted path of the class (or function) that builds a layer's router."""

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


@dataclass(kw_only=True)
class RoutingConfig:
    """How tokens reach experts; fixed for the whole run."""

    mode: str = "learned"
    """``learned`` (trained softmax top-k), ``cluster`` (FAISS, never trained), ``label`` (by the known distribution),
    ``hash`` (by token id, never trained), or the dotted path of a ``Router`` subclass of your own."""
    top_k: int = 2
    """Experts per token; cost per token depends on it and not on how many experts there are."""
    renormalize: bool = True
    """Divide the chosen gate weights by their sum (Mixtral)."""
    balance_loss: float = 0.01
    """Coefficient of the load-balancing loss (1 at perfect balance); ``learned`` only."""
    balance_over: BalanceOver = BalanceOver.all
    """Spread tokens over ``all`` experts or over this stage's ``active`` ones only."""
    z_loss: float = 0.001
    """Coefficient of the router z-loss; ``learned`` only."""
    bundles: Bundles = Bundles.none
    """A token uses the experts of one stage alone, among which ``learned`` or ``cluster`` (token level) chooses.
    ``cluster``: FAISS picks the stage from the text so far, a chunk at a time; ``label``: by the known distribution;
    ``none``: a token may use all experts."""
    margin: float = 4.0
    """``bundles=cluster``: nats by which a newer bundle must explain the text so far better than an older one."""
    level: Level = Level.token
    """``cluster`` only: one assignment a ``token``, or one a chunk of a ``document``."""
    features: Features = Features.embedding
    """Token-level clusters: of a frozen token ``embedding`` (drift-free) or of the layer's ``hidden`` input."""
    feature_width: int = 64
    """Dimensions kept by the SVD behind ``embedding`` and ``tfidf`` features."""
    scale: float = 10.0
    """Token-level clusters: gate weights are ``softmax(scale * x.c)`` over the chosen unit-length centroids."""
    centroids: Centroids = Centroids.fitted
    """``random`` is the null to compare with: random directions for tokens, a hash of the first chunk for documents."""
    clusters: int | None = None
    """Clusters a stage has, where text is clustered. The default gives each cluster of ``level=document`` ``top_k``
    experts of its own, and each bundle 8 centroids."""
    chunk_tokens: int = 64
    """Document-level, and ``bundles=cluster``: tokens that share one assignment, made from the tokens before them."""
    sample_tokens: int = 32_768
    """Training tokens that centroids are fitted on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for a router named by dotted path."""

    def __post_init__(self) -> None:
        if self.mode not in ROUTERS and "." not in self.mode:
            near = difflib.get_close_matches(self.mode, ROUTERS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"routing.mode={self.mode} is unknown; there are {', '.join(ROUTERS)}, or a dotted path.{hint}"
            )
        if self.top_k < 1:
            raise ConfigError(f"routing.top_k={self.top_k} must be at least 1.")
        if self.top_k == 1 and self.renormalize and self.mode == "learned":
            raise ConfigError(
                "routing.renormalize=true with routing.top_k=1 makes every gate weight 1, so the router gets no "
                "gradient. Set routing.renormalize=false or routing.top_k=2."
            )
        of_embedding = self.level == Level.token and self.features == Features.embedding
        if self.bundles != Bundles.none and self.mode != "learned" and not (self.mode == "cluster" and of_embedding):
            raise ConfigError(
                f"routing.bundles={self.bundles} needs routing.mode=learned, or cluster with level=token and "
                f"features=embedding; got routing.mode={self.mode}. Set routing.bundles=none otherwise."
            )
        if self.options and self.mode in ROUTERS:
            raise ConfigError(f"routing.options is for routers named by dotted path, not for {self.mode}.")
        for key in ("balance_loss", "z_loss", "margin"):
            if getattr(self, key) < 0:
                raise ConfigError(f"routing.{key}={getattr(self, key)} must not be negative.")
        for key in ("scale", "chunk_tokens", "sample_tokens", "feature_width"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"routing.{key}={getattr(self, key)} must be positive.")
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"routing.clusters={self.clusters} must be at least 1.")

    @property
    def by_label(self) -> bool:
        """Whether a token's group is its text's known distribution."""
        return self.mode == "label" or self.bundles == Bundles.label

    @property
    def by_document(self) -> bool:
        """Whether a token's group is decided from the text so far, a chunk at a time."""
        return (self.mode == "cluster" and self.level == Level.document) or self.bundles == Bundles.cluster

    @property
    def is_clustered(self) -> bool:
        """Whether a stage fits centroids before it trains."""
        return self.mode == "cluster" or self.bundles == Bundles.cluster

    @property
    def has_bundles(self) -> bool:
        """Whether a token's group names the stage whose experts and deltas it uses."""
        return self.mode == "label" or self.bundles != Bundles.none

    def clusters_of(self, num_experts: int) -> int:
        """How many clusters of text a generation of ``num_experts`` experts has, where :attr:`by_document` holds."""
        default = BUNDLE_CLUSTERS if self.has_bundles else max(1, num_experts // self.top_k)
        return self.clusters or default
