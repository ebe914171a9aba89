"""The result of the drift test. Apart from its computation: a stored plan is read without scipy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Result of the drift test."""

    auc: float | None
    """Cross-validated AUC of telling new sources from old ones; None if a side has a single source."""
    null_quantile: float | None
    """Configured quantile of the AUC under permuted labels; None if there are too few sources for a test."""
    # Reported only: its bias is known for independent documents, and documents of one source are not.
    psi: float | None
    """Population stability index over clusters without its bias, in nats: the size of the shift. None in a stored plan
    where it is not finite."""
    new_sources: int
    old_sources: int
    drifted: bool
    """Whether the test found drift; False if there are too few sources for a test."""
    words: str
    """The result as a sentence."""
