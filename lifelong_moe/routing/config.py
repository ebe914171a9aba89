"""How tokens reach experts. Torch-free; the registry names routers by dotted path and imports them on use."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, get_args, get_type_hints

from lifelong_moe.errors import ConfigError

ROUTERS = {
    "learned": "lifelong_moe.routing.learned.LearnedRouter",
    "switch": "lifelong_moe.routing.switch.SwitchRouter",
    "gshard": "lifelong_moe.routing.gshard.GShardRouter",
    "noisy_topk": "lifelong_moe.routing.noisy.NoisyRouter",
    "vmoe": "lifelong_moe.routing.vmoe.VMoERouter",
    "hierarchical": "lifelong_moe.routing.hierarchical.HierarchicalRouter",
    "dense": "lifelong_moe.routing.dense.DenseRouter",
    "relu": "lifelong_moe.routing.relu.ReluRouter",
    "base": "lifelong_moe.routing.balanced.BalancedRouter",
    "expert_choice": "lifelong_moe.routing.expert_choice.ExpertChoiceRouter",
    "soft": "lifelong_moe.routing.soft.SoftRouter",
    "cluster": "lifelong_moe.routing.cluster.build_cluster_router",
    "label": "lifelong_moe.routing.group.LabelRouter",
    "hash": "lifelong_moe.routing.hashing.HashRouter",
}
"""``routing.mode`` → dotted path of the class (or function) that builds a layer's router."""

UNTRAINED = ("cluster", "label", "hash")
"""Modes whose routers have no trained rows."""

FOR_ENCODERS = ("soft",)
"""Modes that no run can have: for the encoder of ``lifelong_moe/model/encoder.py``, which no pipeline trains."""

LEAKING = ("base", "expert_choice", *FOR_ENCODERS)
"""Modes in which later tokens change earlier ones: in training, or always."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "switch": {
        "top_k": 1,
        "renormalize": False,
        "jitter": 0.01,
        "balance_loss": 0.01,  # Mesh TensorFlow, transformer/moe.py: loss_coef, summed over layers
        "z_loss": 0.0,
        "capacity": {"factor": 1.25, "eval_factor": 2.0, "least": 4},
    },
    "gshard": {
        "second": "random",
        "balance_counts": "first",
        "balance_loss": 0.01,  # Lingvo, gshard_builder.py: aux_loss_coef, summed over layers
        "z_loss": 0.0,
        "capacity": {"factor": 2.0, "eval_factor": 2.0, "least": 4},
    },
    "noisy_topk": {"importance_loss": 0.1, "load_loss": 0.1, "balance_loss": 0.0, "z_loss": 0.0},
    "vmoe": {
        "renormalize": False,
        "importance_loss": 0.005,
        "load_loss": 0.005,
        "balance_loss": 0.0,
        "z_loss": 0.0,
        "capacity": {
            "factor": 1.05,
            "eval_factor": 1.05,
            "counts": "assignments",
            "rounding": "up",
            "multiple": 4,
            "priority": "batch",
        },
    },
    "hierarchical": {"top_k": 4, "expert_groups": 2, "top_groups": 2, "z_loss": 0.0},
    "dense": {"balance_loss": 0.0, "z_loss": 0.0},
    "relu": {"renormalize": False, "balance_loss": 0.0, "z_loss": 0.0},
    "base": {"top_k": 1, "renormalize": False, "balance_loss": 0.0, "z_loss": 0.0},
    "expert_choice": {"renormalize": False, "balance_loss": 0.0, "z_loss": 0.0},
}
"""What a mode sets unless the user does: its authors' values, so that one key switches from one system to another."""

SINGLE = ("switch", "base")
"""Modes that choose one expert a token."""

KNOWN = {
    "bias_rate": ("learned", "switch"),
    "score": ("learned", "switch"),
    "expert_groups": ("learned", "hierarchical", "hash"),
    "table": ("hash",),
    "slots": ("soft",),
    "competitive": ("dense",),
    "jitter": ("learned", "switch", "gshard"),
    "capacity": ("learned", "switch", "gshard", "vmoe"),
    "second": ("gshard",),
    "balance_counts": ("learned", "switch", "gshard", "noisy_topk", "vmoe", "hierarchical"),
    "importance_loss": ("noisy_topk", "vmoe"),
    "load_loss": ("noisy_topk", "vmoe"),
}
"""Modes that know a key; in all others it has its default."""

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


class Counts(StrEnum):
    """What capacity is a share of."""

    tokens = "tokens"
    assignments = "assignments"


class Rounding(StrEnum):
    """How capacity becomes a whole number."""

    down = "down"
    up = "up"


class Priority(StrEnum):
    """Who is served first where an expert's room is short."""

    token = "token"
    choice = "choice"
    batch = "batch"
    random = "random"


class Overflow(StrEnum):
    """What becomes of an assignment that finds no room."""

    residual = "residual"
    next_choice = "next_choice"


@dataclass(kw_only=True)
class CapacityConfig:
    """How many of a sequence's tokens an expert takes; without this section there is no limit and nothing is dropped.

    It is a share of ``model.context``, not of the tokens at hand, so that neither batch mates nor the length of what
    follows changes it.
    """

    factor: float = 1.25
    """Capacity factor in training; 1 is just enough if experts are used evenly."""
    eval_factor: float = 2.0
    """The same in evaluation."""
    counts: Counts = Counts.tokens
    """Factor times ``tokens`` / experts (Switch, GShard), or times ``assignments``, which are ``top_k`` as many."""
    rounding: Rounding = Rounding.down
    """To a whole number (Mesh, Lingvo: ``down``; DeepSpeed: ``up``)."""
    multiple: int = 1
    """Then up to a multiple of this."""
    least: int = 1
    """At least so many."""
    priority: Priority = Priority.token
    """``token`` by token (class B: earlier tokens never lose to later ones); every first ``choice`` before any second
    (GShard); largest gate of the ``batch`` first (V-MoE); ``random`` in training and ``choice`` in evaluation
    (DeepSpeed). All but the first let later tokens change earlier ones."""
    overflow: Overflow = Overflow.residual
    """A dropped assignment adds nothing (``residual``), or goes to the token's ``next_choice`` that has room, at that
    expert's gate, which lets later tokens change earlier ones."""

    def __post_init__(self) -> None:
        for key in ("factor", "eval_factor"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"routing.capacity.{key}={getattr(self, key)} must be positive.")
        for key in ("multiple", "least"):
            if getattr(self, key) < 1:
                raise ConfigError(f"routing.capacity.{key}={getattr(self, key)} must be at least 1.")

    @property
    def is_ordered(self) -> bool:
        """Whether earlier tokens never lose to later ones."""
        return self.priority == Priority.token and self.overflow == Overflow.residual


@dataclass(kw_only=True)
class RoutingConfig:
    """How tokens reach experts; fixed for the whole run."""

    mode: str = "learned"
    """``learned`` (trained top-k: Mixtral, DeepSeek and most others), ``switch``, ``gshard``, ``noisy_topk``, ``vmoe``,
    ``hierarchical``, ``dense`` (Jacobs), ``relu`` (ReMoE), ``base``, ``expert_choice``, ``cluster`` (FAISS, never
    trained), ``label`` (by the known distribution), ``hash`` (by token id, never trained), or the dotted path of a
    ``Router`` subclass of your own. A mode brings its authors' values for keys that are not set: docs/systems.md."""
    top_k: int = 2
    """Experts per token; so many run, however many there are, and each further one adds a row of the router."""
    renormalize: bool = True
    """Divide the chosen gate weights by their sum (Mixtral)."""
    score: Score = Score.softmax
    """Scores from logits: ``softmax`` over all experts, or each its own ``sigmoid`` (DeepSeek-V3)."""
    gate_scale: float = 1.0
    """Factor on the gate weights (DeepSeek-V3: 2.5)."""
    bias_rate: float = 0.0
    """Above 0 each expert has a bias that takes part in choosing, not in weighting, and moves by so much a step
    against its load over the global batch (DeepSeek-V3: 0.001)."""
    expert_groups: int = 1
    """``learned``: divide the experts into so many groups, of which a token uses the best ``top_groups``
    (DeepSeek-V3). ``hierarchical``: groups that the first stage's experts form, each with a gate of its own; a later
    stage's form as many, or fewer where each would have less experts than a token uses of it. ``hash``: a token uses
    one expert of each group, at weight 1 (MultiHash)."""
    top_groups: int = 1
    """Groups that a token uses; ``hierarchical``: two or more, and two or more experts of each."""
    jitter: float = 0.0
    """In training the router's input, and nothing else, is multiplied by numbers between 1 - jitter and 1 + jitter."""
    competitive: bool = False
    """``dense``: in the last layer each expert predicts by itself, and the prediction is their mixture (Jacobs: experts
    compete), in place of the prediction from their outputs' sum (they cooperate)."""
    table: HashTable = HashTable.random
    """``hash``: experts by a fixed pseudo-random order for each token id (``random``), or by a table made of the first
    stage's text: ``balanced``, the most frequent token id to the expert with least text so far, or ``clustered``, by
    FAISS clusters of token embeddings."""
    slots: int = 1
    """Has no use in a run: Soft MoE's slots of each expert, in an encoder of your own."""
    second: SecondExpert = SecondExpert.all
    """``gshard`` in training: use the second expert always (``all``), if its share of both gates exceeds 0.2
    (``threshold``), or with twice that share as probability (``random``). In evaluation always."""
    capacity: CapacityConfig | None = None
    """Room of each expert; none by default: nothing is ever dropped."""
    allow_noncausal: bool = False
    """Let a router be used that lets later tokens change earlier ones. Its losses say nothing about generation."""
    balance_loss: float = 0.0025
    """Coefficient of the load-balancing loss (1 at perfect balance), where rows are trained. Losses of routers are
    summed over layers, as most authors do; curves show their mean. The default is 0.01 averaged over the four layers
    of the measured runs, and a coefficient that was published for an average is to be divided by the layers."""
    balance_counts: BalanceCounts = BalanceCounts.all
    """Count ``all`` choices, or ``first`` ones only (GShard). Of ``learned`` with ``bias_rate`` or ``expert_groups``:
    those that scores alone would make among all experts (DeepSeek-V3)."""
    balance_scope: BalanceScope | None = None
    """Count choices in each ``sequence`` (DeepSeek-V3), in a ``microbatch``, or in all of a step's micro-batches so far
    (``global_batch``, Qwen3); over all processes, whose number changes nothing. By default where room is counted: in
    each sequence with ``capacity``, which allows nothing else, and in a micro-batch without."""
    importance_loss: float = 0.0
    """Coefficient of the squared coefficient of variation of what experts' gates sum to: ``noisy_topk``, of the chosen
    experts' gates; ``vmoe``, of all gates without noise, in each sequence. Summed over layers."""
    load_loss: float = 0.0
    """``noisy_topk``, ``vmoe``: the same of experts' expected loads, were their noise drawn again."""
    balance_over: BalanceOver = BalanceOver.all
    """Spread tokens over ``all`` experts or over this stage's ``active`` ones only."""
    z_loss: float = 0.00025
    """Coefficient of the router z-loss, where rows are trained; summed over layers. The default is 0.001 averaged over
    four."""
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
            modes = [mode for mode in ROUTERS if mode not in FOR_ENCODERS]
            near = difflib.get_close_matches(self.mode, modes, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"routing.mode={self.mode} is unknown; there are {', '.join(modes)}, or a dotted path.{hint}"
            )
        if self.top_k < 1:
            raise ConfigError(f"routing.top_k={self.top_k} must be at least 1.")
        if self.top_k == 1 and self.renormalize and self.mode in ("learned", "switch", "gshard", "noisy_topk"):
            spared = "" if self.mode == "noisy_topk" else "routing.renormalize=false or "
            raise ConfigError(
                "routing.renormalize=true with routing.top_k=1 makes every gate weight 1, so the router gets no "
                f"gradient. Set {spared}routing.top_k=2."
            )
        self._check_numbers()
        self._check_mode()
        of_embedding = self.level == Level.token and self.features == Features.embedding
        if self.bundles != Bundles.none and self.mode != "learned" and not (self.mode == "cluster" and of_embedding):
            raise ConfigError(
                f"routing.bundles={self.bundles} needs routing.mode=learned, or cluster with level=token and "
                f"features=embedding; got routing.mode={self.mode}. Set routing.bundles=none otherwise."
            )
        if self.options and self.mode in ROUTERS:
            raise ConfigError(f"routing.options is for routers named by dotted path, not for {self.mode}.")

    def _check_numbers(self) -> None:
        for key in ("balance_loss", "z_loss", "margin", "importance_loss", "load_loss", "bias_rate", "jitter"):
            if getattr(self, key) < 0:
                raise ConfigError(f"routing.{key}={getattr(self, key)} must not be negative.")
        for key in ("scale", "chunk_tokens", "sample_tokens", "feature_width", "gate_scale", "expert_groups", "slots"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"routing.{key}={getattr(self, key)} must be positive.")
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"routing.clusters={self.clusters} must be at least 1.")
        if self.jitter >= 1:
            raise ConfigError(f"routing.jitter={self.jitter} must be below 1.")
        if not 1 <= self.top_groups <= self.expert_groups:
            raise ConfigError(
                f"routing.top_groups={self.top_groups} must lie in 1 to routing.expert_groups={self.expert_groups}."
            )

    def _check_mode(self) -> None:
        """A key that a mode does not know is refused, lest somebody believe it does something."""
        standard = {f.name: f.default for f in dataclasses.fields(self)}
        for key, modes in KNOWN.items():
            if "." not in self.mode and self.mode not in modes and getattr(self, key) != standard[key]:
                raise ConfigError(f"routing.{key} is for routing.mode={' or '.join(modes)}, not for {self.mode}.")
        self._check_scope()
        if (self.mode in SINGLE and self.top_k != 1) or (self.mode == "gshard" and self.top_k != 2):
            number = 1 if self.mode in SINGLE else 2
            raise ConfigError(
                f"routing.mode={self.mode} chooses {number} expert(s) a token: set routing.top_k={number}."
            )
        if self.mode == "hash" and self.expert_groups > 1 and self.top_k != self.expert_groups:
            raise ConfigError(
                f"routing.top_k={self.top_k} must be routing.expert_groups={self.expert_groups}: one expert of each."
            )
        if self.has_table and self.top_k > 1:
            raise ConfigError(f"routing.table={self.table} gives each token id one expert: set routing.top_k=1.")
        if self.mode == "hierarchical" and self.top_k % self.top_groups:
            raise ConfigError(
                f"routing.top_k={self.top_k} must be a multiple of routing.top_groups={self.top_groups}: each group "
                f"gives as many experts."
            )
        if self.bundles != Bundles.none and (self.capacity or self.bias_rate or self.expert_groups > 1):
            raise ConfigError("routing.bundles cannot be used with routing.capacity, bias_rate or expert_groups.")

    def _check_scope(self) -> None:
        counted = ("learned", "switch", "gshard")
        if self.balance_scope == BalanceScope.global_batch and "." not in self.mode and self.mode not in counted:
            raise ConfigError(f"routing.balance_scope=global_batch is for routing.mode={' or '.join(counted)}.")
        if self.capacity is not None and self.balance_scope not in (None, BalanceScope.sequence):
            raise ConfigError(
                f"routing.balance_scope={self.balance_scope} cannot be used with routing.capacity, which counts in "
                f"each sequence, and so does balance. Leave routing.balance_scope out, or set routing.capacity=null."
            )

    @property
    def counts_balance_in(self) -> BalanceScope:
        """Over which tokens the load-balancing loss counts choices: where room is counted, unless there is no limit."""
        if self.balance_scope is not None:
            return self.balance_scope
        return BalanceScope.microbatch if self.capacity is None else BalanceScope.sequence

    @property
    def leaks(self) -> str | None:
        """The setting by which later tokens change earlier ones, at least where loads bind; None if they never do."""
        if self.mode in LEAKING:
            return f"routing.mode={self.mode}"
        if self.capacity is None or self.capacity.is_ordered:
            return None
        key = "priority" if self.capacity.priority != Priority.token else "overflow"
        return f"routing.capacity.{key}={getattr(self.capacity, key)}"

    @property
    def has_table(self) -> bool:
        """Whether a table from token ids to experts is fitted before training."""
        return self.table != HashTable.random

    @property
    def is_fixed(self) -> str | None:
        """The setting by which the number of experts cannot change; None if it can."""
        if self.has_table:
            return f"routing.table={self.table}"
        return (
            f"routing.expert_groups={self.expert_groups}" if self.mode == "learned" and self.expert_groups > 1 else None
        )

    @property
    def has_rows(self) -> bool:
        """Whether the router has trained rows, one an expert."""
        return self.mode not in UNTRAINED

    def effective(self, *, grown: bool) -> RoutingConfig:
        """The same, with every key that changes nothing at its default: equal work, equal keys.

        Args:
            grown: Whether the model has experts of more than one stage.
        """
        if self.mode not in ROUTERS:
            return self  # a router of the user's own may read any key
        found = self._without(() if grown else ("bundles", "balance_over"))  # with one generation there is no choice
        if found.bundles != Bundles.cluster:
            found = found._without(("margin",))
        found = found._without_losses()._without_clusters()
        if self.mode not in ("learned", "switch", "gshard"):
            # The others have weights of their own kind; false is what each of them may be written with.
            found = dataclasses.replace(found._without(("gate_scale",)), renormalize=False)
        if self.mode == "hash":
            found = found._without(("top_groups",))  # it uses one expert of each group
        return dataclasses.replace(found, allow_noncausal=self.leaks is not None)  # a permission, where one is needed

    def _without_losses(self) -> RoutingConfig:
        """Without what shapes losses that are not there."""
        found = self if self.has_rows else self._without(("balance_loss", "z_loss"))
        if not (found.has_rows and found.balance_loss):
            return found._without(("balance_counts", "balance_scope", "balance_over"))
        implied = found._without(("balance_scope",))
        return implied if implied.counts_balance_in == found.counts_balance_in else found

    def _without_clusters(self) -> RoutingConfig:
        """Without what shapes clusters that are not there, or that are drawn and not fitted."""
        of_tokens = self.mode == "cluster" and self.level == Level.token
        of_embedding = of_tokens and self.features == Features.embedding
        fits_text = self.by_document and self.centroids == Centroids.fitted
        embeds = self.table == HashTable.clustered
        used = {
            "level": self.mode == "cluster",
            "features": of_tokens,
            "scale": of_tokens,
            "centroids": of_tokens or self.by_document,
            "clusters": self.by_document,
            "chunk_tokens": self.by_document,
            "feature_width": of_embedding or fits_text or embeds,
            "sample_tokens": of_tokens,
        }
        return self._without(tuple(key for key, is_used in used.items() if not is_used))

    def with_losses_of(self, other: RoutingConfig) -> RoutingConfig:
        """With another one's losses, if it chooses alike: these are a stage's, all else is its parent's."""
        if (self.mode, self.capacity) != (other.mode, other.capacity):
            return self
        return dataclasses.replace(self, **{key: getattr(other, key) for key in LOSS_KEYS})

    def _without(self, keys: tuple[str, ...]) -> RoutingConfig:
        """With some keys at their defaults."""
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: defaults[key] for key in keys})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RoutingConfig:
        """From plain JSON data, as ``dataclasses.asdict`` gives it; absent keys have their defaults."""
        values = {**data, "capacity": _built(CapacityConfig, data["capacity"]) if data.get("capacity") else None}
        if values["capacity"] and values.get("balance_scope") != BalanceScope.sequence:
            values["balance_scope"] = None  # an earlier version's may contradict its capacity; it trains no more
        return _built(cls, values)

    @property
    def by_process(self) -> bool:
        """Whether the number of processes changes what is learned: each draws random numbers, or assigns its tokens
        all at once. Of a router that we do not know it is assumed."""
        draws = self.jitter > 0 or self.mode in ("noisy_topk", "vmoe") or self.second == SecondExpert.random
        draws = draws or (self.capacity is not None and self.capacity.priority == Priority.random)
        return draws or self.mode == "base" or "." in self.mode

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
        return self.mode == "cluster" or self.bundles == Bundles.cluster or self.has_table

    @property
    def has_bundles(self) -> bool:
        """Whether a token's group names the stage whose experts and deltas it uses."""
        return self.mode == "label" or self.bundles != Bundles.none

    def groups_of(self, num_experts: int) -> int:
        """How many groups a generation of ``num_experts`` experts forms in a hierarchy: each has what a token uses."""
        return min(self.expert_groups, num_experts // (self.top_k // self.top_groups))

    def clusters_of(self, num_experts: int) -> int:
        """How many clusters of text a generation of ``num_experts`` experts has, where :attr:`by_document` holds."""
        default = BUNDLE_CLUSTERS if self.has_bundles else max(1, num_experts // self.top_k)
        return self.clusters or default


def _built(cls: type[Any], data: dict[str, Any]) -> Any:
    """Build a configuration from plain data: enumerations from their values."""
    hints = get_type_hints(cls)
    # Of an optional one the first of its types is the enumeration.
    types = {key: (*get_args(hints[key]), hints[key])[0] for key, value in data.items() if value is not None}
    kinds = {key: kind for key, kind in types.items() if isinstance(kind, type) and issubclass(kind, StrEnum)}
    return cls(**{key: kinds[key](value) if key in kinds else value for key, value in data.items()})
