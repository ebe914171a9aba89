"""Settings of the trained top-k routers: ``learned``, ``switch``, ``gshard``, and the user's own. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lifelong_moe.config.routing.base import BalanceCounts, Bundles, Centroids, RoutingConfig, Score, SecondExpert
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.routing.shared import (
    BalancedConfig,
    CapacityKeys,
    CountsConfig,
    GroupsConfig,
    TextClusterConfig,
    ZLossConfig,
    require_multiple,
)
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class TopKConfig(CapacityKeys, ZLossConfig, BalancedConfig):
    """Trained top-k routing of any kind.

    Attributes without a type annotation are constants of the mode; a subclass that annotates one makes it a key.
    """

    gate_scale: float = 1.0
    """Factor on the gate weights (DeepSeek-V3: 2.5)."""
    jitter: float = 0.0
    """In training, the router's input (not the experts') is multiplied by random numbers between 1 - jitter and
    1 + jitter; 0 is none."""

    score = Score.softmax
    renormalize = False
    bias_rate = 0.0
    top_groups = 1
    supports_global_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter >= 1:
            raise ConfigError(f"routing.jitter={self.jitter} must be below 1.")

    @property
    def varies_by_process(self) -> bool:
        """Jitter is each process's own."""
        return super().varies_by_process or self.jitter > 0


@dataclass(kw_only=True)
class SigmoidConfig(TopKConfig):
    """Modes whose scores may be sigmoids, and whose choices may depend on biases."""

    score: Score = Score.softmax
    """Function from logits to scores: ``softmax`` over all experts, or a ``sigmoid`` of each (DeepSeek-V3)."""
    bias_rate: float = 0.0
    """Above 0, each expert has a bias that affects choices but not gate weights. It moves by this much per step,
    against the expert's load over the global batch (DeepSeek-V3: 0.001). 0: no biases."""


@dataclass(kw_only=True)
class LearnedConfig(GroupsConfig, SigmoidConfig, CountsConfig, TextClusterConfig):
    """``routing.mode=learned``."""

    renormalize: bool = True
    """Divide the chosen gate weights by their sum (Mixtral)."""
    sample_tokens: int = 32_768
    """``bundles=cluster`` after ``model.from``: tokens that the checkpoint writes, by which its text is recognized."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # A softmax over one logit is 1, whatever the router says.
        if self.top_k == 1 and self.renormalize:
            raise ConfigError(
                "routing.renormalize=true with routing.top_k=1 makes every gate weight 1, so the router gets no "
                "gradient. Set routing.renormalize=false or routing.top_k=2."
            )

    def idle_keys(self) -> set[str]:
        """Also the number of tokens, where no text is told apart by what it says."""
        fits = self.bundles == Bundles.cluster and self.centroids == Centroids.fitted
        return super().idle_keys() | (set() if fits else {"sample_tokens"})

    def _check_bundles(self) -> None:
        # Generations share room, biases and groups, so a later one would change what older text uses.
        if self.capacity or self.bias_rate or self.expert_groups > 1:
            raise ConfigError("routing.bundles cannot be used with routing.capacity, bias_rate or expert_groups.")

    def require_groups(self, num_experts: int, key: str, *, is_first: bool) -> None:
        """Require groups of one size, and as many experts in ``top_groups`` of them as a token uses."""
        groups = self.expert_groups
        require_multiple(num_experts, groups, key)
        held = num_experts // groups * self.top_groups
        if groups > 1 and self.top_k > held:
            raise ConfigError(
                f"routing.top_k={self.top_k} is more than the {held} experts that routing.top_groups="
                f"{self.top_groups} of {groups} groups of {key}={num_experts} hold. Set top_k to {held} or less, or "
                f"more top_groups."
            )

    @property
    def fixed_by(self) -> str | None:
        """The number of groups, since groups cannot grow."""
        return f"routing.expert_groups={self.expert_groups}" if self.expert_groups > 1 else None


@dataclass(kw_only=True)
class SwitchConfig(SigmoidConfig):
    """``routing.mode=switch``."""

    mode: str = "switch"
    top_k: int = 1
    # Mesh TensorFlow: moe_switch_jitter
    jitter: float = 0.01
    # Mesh TensorFlow, transformer/moe.py: loss_coef, summed over layers
    balance_loss: float = 0.01
    # The z-loss is younger (ST-MoE, 2022).
    z_loss: float = 0.0
    capacity: CapacityConfig | None = field(
        default_factory=lambda: CapacityConfig(factor=1.25, eval_factor=2.0, least=4)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(1)


@dataclass(kw_only=True)
class GShardConfig(TopKConfig, CountsConfig):
    """``routing.mode=gshard``."""

    mode: str = "gshard"
    renormalize: bool = True
    """Divide the chosen gate weights by their sum (Mixtral)."""
    second: SecondExpert = SecondExpert.random
    """When training uses the second expert: always (``all``), if its share of both gates exceeds 0.2 (``threshold``),
    or with twice that share as probability (``random``). Evaluation always uses it."""
    balance_counts: BalanceCounts = BalanceCounts.first
    # Lingvo, gshard_builder.py: aux_loss_coef, summed over layers
    balance_loss: float = 0.01
    # The z-loss is younger (ST-MoE, 2022).
    z_loss: float = 0.0
    capacity: CapacityConfig | None = field(
        # Twice the tokens: room for both choices of each where experts are used evenly.
        default_factory=lambda: CapacityConfig(factor=2.0, eval_factor=2.0, least=4)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(2)

    @property
    def varies_by_process(self) -> bool:
        """A random second expert is each process's own."""
        return super().varies_by_process or self.second == SecondExpert.random


@dataclass(kw_only=True)
class CustomRouterConfig(GroupsConfig, SigmoidConfig, CountsConfig):
    """A router of the user's own, named by dotted path: all keys of trained top-k routing, and options."""

    renormalize: bool = True
    """Divide the chosen gate weights by their sum (Mixtral)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the router that ``mode`` names by dotted path."""
    # The router may draw random numbers; to be safe, the number of processes is part of the key.
    draws_per_process: ClassVar[bool] = True

    def effective(self, *, grown: bool) -> RoutingConfig:
        """Itself, since the router may read any key."""
        return self
