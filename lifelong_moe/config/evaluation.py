"""What is measured after each stage. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class EvaluateConfig:
    """Held-out loss after each stage, on every distribution of the run."""

    also: list[str] = field(default_factory=list)
    """Distributions that are evaluated and never trained."""
    tokens: int = 50_000
    """Held-out tokens a distribution (whole documents, so slightly more)."""
    batch_tokens: int = 8192
    """Tokens a forward pass; changes memory and speed, not results."""
    keep_heldout: bool = True
    """Keep a copy of held-out documents, which nothing is trained on, in ``mlruns/heldout``: forgetting can then be
    measured when the files are gone. Without it a distribution whose files are gone is measured no more."""

    def __post_init__(self) -> None:
        for key in ("tokens", "batch_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"evaluate.{key}={getattr(self, key)} must be positive.")
