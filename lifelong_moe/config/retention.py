"""What holds the old knowledge in place while a new distribution is learned. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.errors import ConfigError

WRITTEN_AT_ONCE = 64
"""Blocks that the old model writes side by side; bounds memory."""


class TrunkTraining(StrEnum):
    """How the shared parts (attention, norms, embedding, head) train from the second stage on."""

    frozen = "frozen"
    gentle = "gentle"
    full = "full"
    deltas = "deltas"


class DistillText(StrEnum):
    """Which tokens of a batch the teacher is asked about."""

    new = "new"
    replay = "replay"


class ReplaySource(StrEnum):
    """Where replayed text comes from."""

    stored = "stored"
    generated = "generated"


class PenaltyKind(StrEnum):
    """A quadratic pull to the previous stage's weights."""

    none = "none"
    l2 = "l2"
    ewc = "ewc"


@dataclass(kw_only=True)
class TrunkConfig:
    """The shared parts: everything but experts and router rows."""

    train: TrunkTraining = TrunkTraining.full
    """``frozen``, ``gentle`` (at ``lr_scale`` times the rate), ``full``, or ``deltas``: the trunk stays as it is, and
    each stage trains low-rank changes of attention, embedding and head that only its own bundle's tokens use."""
    lr_scale: float = 0.1
    """Learning-rate factor of a ``gentle`` trunk."""
    rank: int = 16
    """Rank of each of a stage's ``deltas``."""

    def __post_init__(self) -> None:
        if not 0.0 < self.lr_scale <= 1.0:
            raise ConfigError(f"trunk.lr_scale={self.lr_scale} must lie in (0, 1].")
        if self.rank < 1:
            raise ConfigError(f"trunk.rank={self.rank} must be at least 1.")

    @property
    def is_frozen(self) -> bool:
        """Whether the trunk itself stays as it is."""
        return self.train in (TrunkTraining.frozen, TrunkTraining.deltas)

    def effective(self) -> TrunkConfig | None:
        """The same, with every key that changes nothing at its default; None where the trunk trains like the rest."""
        if self.train == TrunkTraining.full or (self.train == TrunkTraining.gentle and self.lr_scale == 1):
            return None
        if self.train == TrunkTraining.gentle:
            return TrunkConfig(train=self.train, lr_scale=self.lr_scale)
        return TrunkConfig(train=self.train, **({"rank": self.rank} if self.train == TrunkTraining.deltas else {}))


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation from the previous stage's model: per-token KL x T squared."""

    weight: float = 0.5
    """Factor on the distillation loss, a mean over distilled tokens; 0 turns it off."""
    temperature: float = 2.0
    """Softens teacher and student alike."""
    text: DistillText = DistillText.replay
    """Distil on the ``new`` text or on ``replay``ed text, which ``replay.source`` may take from the teacher itself."""
    fraction: float = 1.0
    """Share of that text's sequences that is distilled on, spread evenly."""
    until: float = 1.0
    """Share of the stage's steps after which distillation is switched off (DeepSpeed-MoE's students)."""
    student: list[int] | None = None
    """The last stage only: keep these layers of the previous stage's model, which is their teacher, and train them all
    (Mixture-of-Students). Nothing grows then."""

    def __post_init__(self) -> None:
        if not 0.0 < self.until <= 1.0:
            raise ConfigError(f"distill.until={self.until} must lie in (0, 1].")
        if self.student is not None and (not self.student or sorted(set(self.student)) != list(self.student)):
            raise ConfigError(f"distill.student={self.student} must name layers in ascending order, each once.")
        if self.weight < 0:
            raise ConfigError(f"distill.weight={self.weight} must not be negative.")
        if self.temperature <= 0:
            raise ConfigError(f"distill.temperature={self.temperature} must be positive.")
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"distill.fraction={self.fraction} must lie in (0, 1].")


@dataclass(kw_only=True)
class ReplayConfig:
    """Text of earlier stages, mixed into the new text; it counts into the stage's tokens."""

    fraction: float = 0.25
    """Share of the stage's sequences, spread evenly over steps and over earlier stages."""
    source: ReplaySource = ReplaySource.stored
    """``stored`` training text, or text ``generated`` by the previous stage's model, for which nothing is stored; of it
    ``penalty.kind=ewc`` takes its Fisher information too."""
    buffer_tokens: int | None = None
    """Tokens of stored text kept of each earlier distribution; None keeps all."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(f"replay.fraction={self.fraction} must lie in [0, 1).")
        if self.buffer_tokens is not None and self.buffer_tokens < 1:
            raise ConfigError(f"replay.buffer_tokens={self.buffer_tokens} must be positive.")
        if self.buffer_tokens is not None and self.source == ReplaySource.generated:
            raise ConfigError(
                f"replay.buffer_tokens={self.buffer_tokens} bounds stored text; with replay.source=generated there is "
                f"none. Set replay.buffer_tokens=null."
            )


DEFAULT_PENALTY = {PenaltyKind.none: 0.0, PenaltyKind.l2: 0.1, PenaltyKind.ewc: 1000.0}
"""``penalty.weight`` if none is given."""


@dataclass(kw_only=True)
class PenaltyConfig:
    """A quadratic pull of everything that trains, and was there before, to the previous stage's weights."""

    kind: PenaltyKind = PenaltyKind.none
    """``l2`` pulls every weight alike, ``ewc`` in proportion to its Fisher information on earlier text."""
    weight: float | None = None
    """Factor on half the weighted sum of squares; by default 0.1 for ``l2`` and 1000 for ``ewc``."""
    fisher_tokens: int = 16_384
    """``ewc``: training tokens of each earlier distribution that the Fisher information is measured on; in all, where
    ``replay.source=generated``."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight < 0:
            raise ConfigError(f"penalty.weight={self.weight} must not be negative.")
        if self.fisher_tokens < 1:
            raise ConfigError(f"penalty.fisher_tokens={self.fisher_tokens} must be positive.")

    def effective(self) -> PenaltyConfig:
        """The same, with its weight spelled out, and without what only another kind reads."""
        tokens = {"fisher_tokens": self.fisher_tokens} if self.kind == PenaltyKind.ewc else {}
        return PenaltyConfig(kind=self.kind, weight=self.factor, **tokens)

    @property
    def factor(self) -> float:
        """``weight``, or the kind's default."""
        return DEFAULT_PENALTY[self.kind] if self.weight is None else self.weight


@dataclass(kw_only=True)
class ReviewConfig:
    """A last phase of a stage in which only its router rows train, on new and earlier text (MoE-LPR)."""

    fraction: float = 0.0
    """Share of the stage's steps; 0 leaves the review out. The stage's tokens stay what they are."""
    replay_fraction: float = 0.5
    """Share of the review's sequences that is earlier text."""
    old_loss: float = 0.1
    """Factor on ``-log`` of the gate probability that earlier text gives to experts older than this stage, a mean over
    tokens and layers, as its authors average it; ``routing``'s losses are summed over layers."""
    lr_scale: float = 1.0
    """Peak rate of the review relative to ``optim.lr``."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(f"review.fraction={self.fraction} must lie in [0, 1).")
        if not 0.0 < self.replay_fraction < 1.0:
            raise ConfigError(f"review.replay_fraction={self.replay_fraction} must lie between 0 and 1.")
        if self.old_loss < 0:
            raise ConfigError(f"review.old_loss={self.old_loss} must not be negative.")
        if self.lr_scale <= 0:
            raise ConfigError(f"review.lr_scale={self.lr_scale} must be positive.")
