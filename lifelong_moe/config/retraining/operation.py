"""What an operator sets around the decision: where data arrives, when to look, how much may be spent. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lifelong_moe.config.data import KeepText
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class InboxConfig:
    """Where new documents arrive: a directory, or a Hugging Face dataset at a revision."""

    path: str | None = "data/inbox"
    """Directory of JSONL, text or Parquet files, with or without a ``manifest.json``; nothing in it is ever changed."""
    hf: str | None = None
    """Id of a Hugging Face dataset instead; set ``path: null``."""
    name: str | None = None
    """Configuration name of the Hugging Face dataset."""
    revision: str | None = None
    """Commit of the Hugging Face dataset, 40 hexadecimal digits."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Field that holds the text."""
    source_field: str = "source"
    """Field that names a document's source unit; drift and gate resample whole units."""
    heldout_fraction: float = 0.15
    """Share of a batch's source units held out for its gate set; at least five units, if the batch has ten. A batch
    that was learned keeps the split that it was learned with."""
    keep_text: KeepText = KeepText.always
    """How long ``mlruns/batches`` keeps the text of a batch: ``always``; ``until_promoted``, until a version that
    learned it serves; or ``never``, until the tick is over. Every batch's documents stay known by their hashes, and a
    learned one's held-out text stays as ``evaluate.keep_heldout`` of the base says. What replays stored text, as
    ``when_continuing`` does by default, needs ``always``."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hf is None):
            raise ConfigError("inbox needs exactly one of path and hf; the other one null.")
        if not 0.0 < self.heldout_fraction < 1.0:
            raise ConfigError(f"inbox.heldout_fraction={self.heldout_fraction} must lie between 0 and 1.")


@dataclass(kw_only=True)
class TriggerConfig:
    """When a batch is worth a look; until then documents gather in the inbox."""

    min_tokens: int = 50_000
    """Tokens of documents never seen before."""
    max_days: float | None = None
    """Days after the newest promotion at which any number of new documents suffices; null waits for ``min_tokens``.
    So it is with what joins a batch without an answer, from the day on which that was looked at."""
    least_documents: int = 20
    """Fewer documents than this are never looked at: neither drift nor a gate could be measured."""

    def __post_init__(self) -> None:
        for key in ("min_tokens", "least_documents"):
            if getattr(self, key) < 1:
                raise ConfigError(f"trigger.{key}={getattr(self, key)} must be at least 1.")
        if self.max_days is not None and self.max_days <= 0:
            raise ConfigError(f"trigger.max_days={self.max_days} must be positive.")


@dataclass(kw_only=True)
class ProbeConfig:
    """Short trainings that show what continuing and growing would bring."""

    fraction: float = 0.02
    """Tokens of a probe, as a share of the stage's; in whole steps, two at least."""
    grow: list[dict[str, Any]] = field(default_factory=list)
    """Ways to grow, each tried by a probe of its own, over the configured ``grow`` settings: such as
    ``[{experts: 2}, {experts: 4}]``, or, of a base with a trained router and ``routing.bundles=none``,
    ``[{experts: 2, layers: [2, 3]}]``. The one of largest utility is proposed; by default only the configured one is
    tried."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"probe.fraction={self.fraction} must lie in (0, 1].")


@dataclass(kw_only=True)
class LimitsConfig:
    """What a tick may spend; null is no limit. What would exceed one is not begun, not even
    a probe of it, and a tick that may not do what the text calls for says so (exit 4)."""

    tokens: int | None = None
    """Training tokens of the stage and of all probes."""
    hours: float | None = None
    """Estimated device-hours of training, by the speed of the champion's last stage."""
    disk_bytes: int | None = None
    """Estimated bytes that the stage adds under ``mlruns/``."""
    experts: int | None = None
    """Experts a layer may have."""
    promotions_per_week: int | None = None
    """Promotions in any seven days."""

    def __post_init__(self) -> None:
        for key in ("tokens", "hours", "disk_bytes", "experts", "promotions_per_week"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"limits.{key}={value} must be positive, or null for no limit.")


@dataclass(kw_only=True)
class HooksConfig:
    """Told of every outcome but an idle tick; their failure is logged and never fails a run."""

    command: list[str] = field(default_factory=list)
    """Program and arguments; the outcome comes as JSON on its standard input."""
    url: str | None = None
    """Address that the outcome is posted to as JSON."""
    seconds: float = 30.0
    """Longest time that a hook may take."""

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError("hooks.url must begin with http:// or https://.")
        if self.seconds <= 0:
            raise ConfigError(f"hooks.seconds={self.seconds} must be positive.")
