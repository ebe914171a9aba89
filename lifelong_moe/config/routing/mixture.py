"""Settings of a mixture over generations. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class MixtureConfig:
    """Predict by a mixture of the generations, weighted by how well each explains the text so far.

    Every generation reads a text from its beginning with its own experts and low-rank changes. The next token's
    probability is the mean of theirs, with weights that depend on the tokens before it alone. A text that only one
    generation explains soon costs what that generation costs.
    """

    likelihood: float = 0.3
    """Power to which a generation's likelihood of the text so far is raised to give its weight. 1 is Bayes' rule; less
    keeps several generations in play for longer, which costs more."""
    drop: float = 1e-6
    """A generation whose weight falls under this share of the largest one reads no more of the text."""

    def __post_init__(self) -> None:
        if not 0 <= self.likelihood <= 1:
            raise ConfigError(f"routing.mixture.likelihood={self.likelihood} must lie in 0 to 1.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"routing.mixture.drop={self.drop} must be at least 0 and below 1.")
