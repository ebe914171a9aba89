"""Settings of what is measured after each stage. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class EvaluateConfig:
    """Held-out loss after each stage, on every distribution of the run."""

    also: list[str] = field(default_factory=list)
    """Distributions to evaluate after each stage besides those of the stages; they are never trained on."""
    tokens: int = 50_000
    """Held-out tokens per distribution; whole documents are scored, so slightly more."""
    batch_tokens: int = 8192
    """Tokens per forward pass; affects memory and speed, not results."""
    # Looks are small batches, which took up to 2.2 times their share of FLOPs in processor time: 2 % of a stage.
    watch: float = 0.01
    """Share of a stage's FLOPs that may be spent on a warning of forgetting while it trains, from the second stage on:
    at most nine quick looks at excerpts of held-out text, of each distribution that the model knew and of the stage's
    own. A stage of few tokens, or after many distributions, affords fewer and shorter looks, or none. 0 turns it off.
    What is trained does not depend on it."""
    keep_heldout: bool = True
    """Keep a copy of the held-out documents in ``mlruns/heldout``, so that forgetting can still be measured once their
    files are gone. If false, a distribution is no longer measured once its files are gone."""

    def __post_init__(self) -> None:
        require_bounded(self, "evaluate.")
        for key in ("tokens", "batch_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"evaluate.{key}={getattr(self, key)} must be positive.")
        # Written so that NaN is rejected as well.
        if not 0.0 <= self.watch <= 1.0:
            raise ConfigError(f"evaluate.watch={self.watch} must lie in [0, 1].")
