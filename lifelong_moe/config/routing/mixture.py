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
    """How much a generation's own likelihood of the text so far counts for its weight: the power that it is raised to.
    1 is Bayes' rule; less keeps several generations in play for longer."""
    clusters: float = 0.0
    """The same for the likelihood of the text so far under the generation's FAISS clusters, which costs nothing."""
    drop: float = 0.01
    """A generation whose weight falls under this share of the largest one reads no more of the text."""

    def __post_init__(self) -> None:
        for key in ("likelihood", "clusters"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"routing.mixture.{key}={getattr(self, key)} must lie in 0 to 1.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"routing.mixture.drop={self.drop} must be at least 0 and below 1.")
