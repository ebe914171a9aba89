"""A run's place in a comparison, by which MLflow finds, groups and averages it."""

from __future__ import annotations

from dataclasses import dataclass

COMPARISON = "comparison"
"""Tag of the runs of a comparison: its name."""


@dataclass(frozen=True)
class Compared:
    """One arm of a comparison with one seed."""

    comparison: str
    """Its name."""
    parent: str | None
    """MLflow run of the comparison, under which this one is shown."""
    arm: str
    seed: int
    method: str
    routing: str
    """``routing.mode``."""

    @property
    def title(self) -> str:
        """The beginning of its name in MLflow, which tells it from its neighbours: narrow columns cut the rest."""
        return f"{self.arm} s{self.seed}"

    @property
    def name(self) -> str:
        """Its name in MLflow."""
        return f"{self.title} · {self.comparison}"

    @property
    def settings(self) -> dict[str, str]:
        """What runs are grouped by: params and tags alike."""
        return {"arm": self.arm, "seed": str(self.seed), "method": self.method, "routing": self.routing}

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the run."""
        return self.settings | {COMPARISON: self.comparison, "lifelong.comparison": self.comparison}
