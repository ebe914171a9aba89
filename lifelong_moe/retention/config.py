"""What holds the old knowledge in place while a new distribution is learned. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.errors import ConfigError


class TrunkTraining(StrEnum):
    """How the shared parts (attention, norms, embedding, head) train from the second stage on."""

    frozen = "frozen"
    gentle = "gentle"
    full = "full"


class DistillText(StrEnum):
    """Which tokens of a batch the teacher is asked about."""

    new = "new"
    replay = "replay"


@dataclass(kw_only=True)
class TrunkConfig:
    """The shared parts: everything but experts and router rows."""

    train: TrunkTraining = TrunkTraining.full
    """``frozen``, ``gentle`` (at ``lr_scale`` times the rate) or ``full``."""
    lr_scale: float = 0.1
    """Learning-rate factor of a ``gentle`` trunk."""

    def __post_init__(self) -> None:
        if not 0.0 < self.lr_scale <= 1.0:
            raise ConfigError(f"trunk.lr_scale={self.lr_scale} must lie in (0, 1].")


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation from the previous stage's model: per-token KL x T squared."""

    weight: float = 0.1
    """Factor on the distillation loss, a mean over distilled tokens; 0 turns it off."""
    temperature: float = 2.0
    """Softens teacher and student alike."""
    text: DistillText = DistillText.replay
    """Distil on the ``new`` text or on ``replay``ed text."""
    fraction: float = 1.0
    """Share of that text's sequences that is distilled on, spread evenly."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"distill.weight={self.weight} must not be negative.")
        if self.temperature <= 0:
            raise ConfigError(f"distill.temperature={self.temperature} must be positive.")
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"distill.fraction={self.fraction} must lie in (0, 1].")


@dataclass(kw_only=True)
class ReplayConfig:
    """Training text of earlier stages, mixed into the new text; it counts into the stage's tokens."""

    fraction: float = 0.05
    """Share of the stage's sequences, spread evenly over steps and over earlier stages."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(f"replay.fraction={self.fraction} must lie in [0, 1).")
