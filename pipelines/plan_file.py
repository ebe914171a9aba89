"""A tick's plan as a file. Apart from what makes one, so that a wrong path is answered before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lifelong_moe.errors import ConfigError, StalePlanError


def read_plan(path: Path) -> dict[str, Any]:
    """The facts of a plan that was made before.

    Raises:
        ConfigError: If there is no such plan.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        texts = (facts["batch"], facts["settings"], facts["expires"], facts["champion"]["key"])
        known = all(isinstance(text, str) for text in texts) and isinstance(facts["exceeded"], list)
        known = known and isinstance(facts["decision"]["action"], str)
        known = known and (facts["stage"] is None or {"key", "continues", "grow"} <= set(facts["stage"]))
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"{path}: not a plan of lifelong-moe retrain.")
    return facts


def refuse_idle_plan(path: str | None, now: str) -> None:
    """Where a tick would have nothing to do, a plan that was to be carried out is stale.

    Args:
        path: Of the plan; None if there is none to carry out.
        now: What the tick found instead of the plan's batch.

    Raises:
        StalePlanError: If there is one.
    """
    if path is not None:
        batch = read_plan(Path(path))["batch"]
        raise StalePlanError(
            f"{path}: made for batch {batch[:16]}, but {now}: files of the inbox are gone or changed, or a tick has "
            f"come to a decision about them; plan again."
        )
