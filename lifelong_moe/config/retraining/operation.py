"""Settings of operation: where data arrives, when a tick looks, what it may spend, whom it notifies. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lifelong_moe.config.data import BadLinesRule, KeepText
from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class InboxConfig:
    """Where new documents arrive: a directory, or a Hugging Face dataset at a revision."""

    path: str | None = "data/inbox"
    """Directory of JSONL, text or Parquet files, with or without a ``manifest.json``; nothing in it is ever changed.
    Null: ``hf`` is used."""
    hf: str | None = None
    """Id of a Hugging Face dataset to use instead; then set ``path: null``. Null: ``path`` is used."""
    name: str | None = None
    """Configuration name of the Hugging Face dataset. Null: its default configuration."""
    revision: str | None = None
    """Commit of the Hugging Face dataset, 40 hexadecimal digits; required with ``hf``, null without."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Field that holds the text."""
    source_field: str = "source"
    """Field that names a document's source unit; drift and gate resample whole units."""
    heldout_fraction: float = 0.15
    """Fraction of a batch's source units held out for its gate set; at least five units, if the batch has ten. A batch
    that was learned keeps its split."""
    bad_lines: BadLinesRule = BadLinesRule.refuse
    """What a line of a JSONL file that holds no document does: ``refuse`` ends the tick with its file, line and reason;
    ``quarantine`` leaves it out and keeps it with these in ``mlruns/runs/RUN/bad_lines.jsonl``."""
    max_bad_lines: int = 100
    """Most lines to quarantine; the next one is refused, since a file with many is not what it is taken for."""
    keep_text: KeepText = KeepText.always
    """How long ``mlruns/batches`` keeps the text of a batch: ``always``; ``until_promoted``, until a version that
    learned it serves; or ``never``, until the tick is over. Every batch's documents stay known by their hashes, and a
    learned one's held-out text stays as ``evaluate.keep_heldout`` of the base says. What replays stored text, as
    ``when_continuing`` does by default, needs ``always``."""

    def __post_init__(self) -> None:
        require_bounded(self, "inbox.")
        # path has a default, so hf alone leaves both set; to prefer one silently would hide a mistake.
        if (self.path is None) == (self.hf is None):
            raise ConfigError("inbox needs exactly one of path and hf; the other one null.")
        if not 0.0 < self.heldout_fraction < 1.0:
            raise ConfigError(f"inbox.heldout_fraction={self.heldout_fraction} must lie between 0 and 1.")
        if self.max_bad_lines < 1:
            raise ConfigError(
                f"inbox.max_bad_lines={self.max_bad_lines} must be positive; bad_lines=refuse takes none."
            )


@dataclass(kw_only=True)
class TriggerConfig:
    """When a tick looks at the inbox; until then documents gather there."""

    min_tokens: int = 50_000
    """Tokens of documents never seen before."""
    max_days: float | None = None
    """Days after the newest promotion from which any number of tokens suffices; null always waits for ``min_tokens``.
    For text that joins a waiting batch, days since that batch was last looked at."""
    # With fewer, neither drift nor the gate could be measured.
    least_documents: int = 20
    """Fewest documents that a tick looks at."""

    def __post_init__(self) -> None:
        require_bounded(self, "trigger.")
        for key in ("min_tokens", "least_documents"):
            if getattr(self, key) < 1:
                raise ConfigError(f"trigger.{key}={getattr(self, key)} must be at least 1.")
        if self.max_days is not None and self.max_days <= 0:
            raise ConfigError(f"trigger.max_days={self.max_days} must be positive.")


@dataclass(kw_only=True)
class ProbeConfig:
    """Short trainings that estimate the utility of continuing and growing."""

    fraction: float = 0.02
    """Tokens of a probe as a fraction of the stage's; rounded to whole steps, at least two."""
    # Mappings and not GrowConfig, whose defaults would replace the configured settings.
    grow: list[dict[str, Any]] = field(default_factory=list)
    """Ways to grow, each a mapping over the configured ``grow`` settings with a probe of its own: such as
    ``[{experts: 2}, {experts: 4}]``, or, for a base with a trained router and ``routing.bundles=none``,
    ``[{experts: 2, layers: [2, 3]}]``. The way of largest utility is proposed; empty tries the configured one."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"probe.fraction={self.fraction} must lie in (0, 1].")


@dataclass(kw_only=True)
class LimitsConfig:
    """What a tick may spend; null is no limit. A stage that would exceed one is not even probed, and a tick that
    may not train what the text calls for exits with 4."""

    tokens: int | None = None
    """Training tokens of a stage and all its probes."""
    hours: float | None = None
    """Estimated device-hours of training, at the speed of the champion's last stage."""
    disk_bytes: int | None = None
    """Estimated bytes that a stage adds under ``mlruns/``."""
    experts: int | None = None
    """Experts per layer."""
    promotions_per_week: int | None = None
    """Promotions in any seven days."""

    def __post_init__(self) -> None:
        require_bounded(self, "limits.")
        for key in ("tokens", "hours", "disk_bytes", "experts", "promotions_per_week"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"limits.{key}={value} must be positive, or null for no limit.")


@dataclass(kw_only=True)
class HooksConfig:
    """Notified of every outcome except ``idle``. Failures of a hook are logged and fail nothing."""

    command: list[str] = field(default_factory=list)
    """Program and arguments; it gets the outcome as JSON on standard input. An empty list runs none."""
    url: str | None = None
    """URL to which the outcome is posted as JSON. Null: none."""
    seconds: float = 30.0
    """Timeout of each hook, in seconds."""

    def __post_init__(self) -> None:
        # urllib would open file:// and ftp:// too.
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError("hooks.url must begin with http:// or https://.")
        if self.seconds <= 0:
            raise ConfigError(f"hooks.seconds={self.seconds} must be positive.")
