"""Settings of capacity: how many tokens an expert takes, and which are dropped. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError


class Counts(StrEnum):
    """The number that the capacity factor multiplies."""

    tokens = "tokens"
    assignments = "assignments"


class Rounding(StrEnum):
    """How capacity is rounded to a whole number."""

    down = "down"
    up = "up"


class Priority(StrEnum):
    """Which assignments come first where an expert's capacity is short."""

    token = "token"
    choice = "choice"
    batch = "batch"
    random = "random"


class Overflow(StrEnum):
    """What happens to an assignment over capacity."""

    residual = "residual"
    next_choice = "next_choice"


@dataclass(kw_only=True)
class CapacityConfig:
    """How many tokens of a sequence an expert takes. Without this section there is no limit and no token is dropped.

    Capacity is a fraction of ``model.context``, not of the tokens at hand, so that it depends on neither the other
    sequences of a batch nor the length of later text.
    """

    # 1.25 and 2: the values of Switch (arXiv:2101.03961) and Mesh TensorFlow.
    factor: float = 1.25
    """Capacity factor in training; 1 is just enough if all experts are used evenly."""
    eval_factor: float = 2.0
    """Capacity factor in evaluation."""
    counts: Counts = Counts.tokens
    """Capacity is the factor times ``tokens`` / experts (Switch, GShard), or ``assignments`` / experts, which is
    ``top_k`` times as much."""
    rounding: Rounding = Rounding.down
    """Round capacity to a whole number ``down`` (Mesh TensorFlow, Lingvo) or ``up`` (DeepSpeed)."""
    multiple: int = 1
    """After rounding, capacity rises to a multiple of this number."""
    least: int = 1
    """Smallest capacity, in tokens."""
    priority: Priority = Priority.token
    """Which assignments come first. ``token``: those of earlier tokens, which never lose to later ones. ``choice``: all
    first choices before any second (GShard). ``batch``: those with the largest gates (V-MoE). ``random``: any in
    training, and ``choice`` in evaluation (DeepSpeed). All but ``token`` let later tokens change earlier ones."""
    overflow: Overflow = Overflow.residual
    """What happens to an assignment over capacity. ``residual``: it adds nothing. ``next_choice``: it goes to the
    token's next choice that has room, with that expert's gate weight, which lets later tokens change earlier ones."""

    def __post_init__(self) -> None:
        require_bounded(self, "routing.capacity.")
        for key in ("factor", "eval_factor"):
            # Written so that NaN is rejected as well.
            if not getattr(self, key) > 0:
                raise ConfigError(f"routing.capacity.{key}={getattr(self, key)} must be positive.")
        for key in ("multiple", "least"):
            if getattr(self, key) < 1:
                raise ConfigError(f"routing.capacity.{key}={getattr(self, key)} must be at least 1.")

    @property
    def is_ordered(self) -> bool:
        """Whether earlier tokens never lose to later ones."""
        return self.priority == Priority.token and self.overflow == Overflow.residual
