"""A tick's plan as a file. Apart from what makes one, so that a wrong path is answered before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lifelong_moe.errors import ConfigError


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
