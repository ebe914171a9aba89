"""How much room experts have, and for whom. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.errors import ConfigError


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

    # 1.25 and 2: the values of Switch (arXiv:2101.03961) and Mesh TensorFlow.
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
