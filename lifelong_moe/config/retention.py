"""Settings against forgetting: trunk, distillation, replay, penalty and review. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError

# Here and not in the room `retention`, since plans count its forward passes without torch.
WRITTEN_AT_ONCE = 64
"""Blocks that the old model generates in parallel; bounds memory."""


class TrunkTraining(StrEnum):
    """How the shared parts (attention, norms, embedding, head) train from the second stage on."""

    frozen = "frozen"
    gentle = "gentle"
    full = "full"
    deltas = "deltas"


class DistillText(StrEnum):
    """Text whose tokens are distilled."""

    new = "new"
    replay = "replay"


class ReplaySource(StrEnum):
    """Where replayed text comes from."""

    stored = "stored"
    generated = "generated"


class PenaltyKind(StrEnum):
    """Kind of the quadratic penalty on the distance to the previous stage's weights."""

    none = "none"
    l2 = "l2"
    ewc = "ewc"


@dataclass(kw_only=True)
class TrunkConfig:
    """Training of the trunk: all parameters but experts and router rows."""

    train: TrunkTraining = TrunkTraining.full
    """``frozen``; ``gentle``, at ``lr_scale`` times the learning rate; ``full``; or ``deltas``: the trunk is frozen,
    and each stage trains low-rank changes of attention, embedding and head that only its own generation's tokens
    use. A matrix that embedding and head share has one for each use."""
    lr_scale: float = 0.1
    """``train=gentle``: learning-rate factor of the trunk, above 0 and at most 1."""
    rank: int = 16
    """``train=deltas``: rank of each low-rank change."""

    def __post_init__(self) -> None:
        require_bounded(self, "trunk.")
        if not 0.0 < self.lr_scale <= 1.0:
            raise ConfigError(f"trunk.lr_scale={self.lr_scale} must lie in (0, 1].")
        if self.rank < 1:
            raise ConfigError(f"trunk.rank={self.rank} must be at least 1.")

    @property
    def is_frozen(self) -> bool:
        """Whether the trunk itself does not change."""
        return self.train in (TrunkTraining.frozen, TrunkTraining.deltas)

    def effective(self) -> TrunkConfig | None:
        """A copy with every key that has no effect at its default; None if the trunk trains like the rest."""
        # At factor 1 `gentle` is `full`, and must not have another key.
        if self.train == TrunkTraining.full or (self.train == TrunkTraining.gentle and self.lr_scale == 1):
            return None
        if self.train == TrunkTraining.gentle:
            return TrunkConfig(train=self.train, lr_scale=self.lr_scale)
        return TrunkConfig(train=self.train, **({"rank": self.rank} if self.train == TrunkTraining.deltas else {}))


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation from the previous stage's model: per-token KL divergence times the squared temperature."""

    weight: float = 0.5
    """Factor on the distillation loss, a mean over distilled tokens; 0 turns it off."""
    # Its square is a factor of the loss, which keeps gradients at one scale (arXiv:1503.02531, section 2).
    temperature: float = 2.0
    """Divisor of the logits of teacher and student; above 1 it flattens both distributions."""
    text: DistillText = DistillText.replay
    """Distil on the ``new`` text or on ``replay``ed text, which the teacher itself writes if ``replay.source`` is
    ``generated``."""
    fraction: float = 1.0
    """Fraction of that text's sequences to distil on, spread evenly over the stage."""
    until: float = 1.0
    """Fraction of the stage's steps after which distillation is switched off (DeepSpeed-MoE's students); 1 keeps it on
    to the end."""
    student: list[int] | None = None
    """Layers of the previous stage's model, ascending and counted from 0, that a shallower student keeps and trains
    entirely; the whole model is its teacher (Mixture-of-Students). For the last stage only, which then adds no experts.
    Null: all layers."""

    def __post_init__(self) -> None:
        require_bounded(self, "distill.")
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
    """Text of earlier stages, mixed into the new text; it counts towards the stage's tokens."""

    fraction: float = 0.25
    """Fraction of the stage's sequences that are replayed, spread evenly over steps and earlier stages; 0 turns replay
    off."""
    source: ReplaySource = ReplaySource.stored
    """``stored`` training text, or text ``generated`` by the previous stage's model, which needs no stored text;
    ``penalty.kind=ewc`` then measures its Fisher information on generated text as well."""
    buffer_tokens: int | None = None
    """Tokens of stored text to replay from, per earlier distribution. Null: all of it."""

    def __post_init__(self) -> None:
        require_bounded(self, "replay.")
        # At 1 a stage would train on no new text.
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
"""``penalty.weight`` where it is null."""


@dataclass(kw_only=True)
class PenaltyConfig:
    """A quadratic penalty on the distance between trainable parameters and their values after the previous stage; new
    experts have none."""

    kind: PenaltyKind = PenaltyKind.none
    """``none``; ``l2``, which penalizes every weight alike; or ``ewc``, in proportion to each weight's Fisher
    information on earlier text."""
    weight: float | None = None
    """Factor on half the weighted sum of squares; 0 turns it off. Null: 0.1 for ``l2`` and 1000 for ``ewc``."""
    fisher_tokens: int = 16_384
    """``kind=ewc``: training tokens of each earlier distribution on which the Fisher information is measured; with
    ``replay.source=generated``, generated tokens in all."""

    def __post_init__(self) -> None:
        require_bounded(self, "penalty.")
        if self.weight is not None and self.weight < 0:
            raise ConfigError(f"penalty.weight={self.weight} must not be negative.")
        if self.fisher_tokens < 1:
            raise ConfigError(f"penalty.fisher_tokens={self.fisher_tokens} must be positive.")

    def effective(self) -> PenaltyConfig:
        """A copy with the weight in numbers, and without keys that only another kind reads."""
        # null and the kind's default are equal work, so both get the same key.
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
    """Fraction of the stage's steps that are the review; 0 leaves it out. The stage's tokens do not change."""
    replay_fraction: float = 0.5
    """Fraction of the review's sequences that are earlier text."""
    old_loss: float = 0.1
    """Factor on ``-log`` of the gate probability that tokens of earlier text give to experts older than this stage,
    averaged over tokens and layers as by its authors; losses of ``routing`` are summed over layers. 0 turns it off."""
    lr_scale: float = 1.0
    """Peak learning rate of the review, relative to ``optim.lr``."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(f"review.fraction={self.fraction} must lie in [0, 1).")
        # Without earlier text, `old_loss` would have nothing to average.
        if not 0.0 < self.replay_fraction < 1.0:
            raise ConfigError(f"review.replay_fraction={self.replay_fraction} must lie between 0 and 1.")
        if self.old_loss < 0:
            raise ConfigError(f"review.old_loss={self.old_loss} must not be negative.")
        if self.lr_scale <= 0:
            raise ConfigError(f"review.lr_scale={self.lr_scale} must be positive.")
