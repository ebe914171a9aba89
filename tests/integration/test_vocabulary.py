"""A run whose stages add tokens to the vocabulary: old text is read as before, new text in fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_config, train, write_config


def growing(*, trunk: str = "deltas", stages: tuple[str, ...] = ("fruit", "code", "sea")) -> dict[str, Any]:
    """Stages after the first add 20 tokens each, the last one none."""
    config = tiny_config(stages, routing={"bundles": "label"})
    config["model"]["document_mask"] = True
    config["stage_defaults"] |= {"trunk": {"train": trunk}, "distill": {"weight": 0.0}, "replay": {"fraction": 0.0}}
    config["stages"] = [{"data": name, "vocabulary": {"add": 20 * (0 < i < 3)}} for i, name in enumerate(stages)]
    return config


def test_old_text_keeps_its_losses(lab: Path) -> None:
    report, printed = train(write_config(growing()))
    print(printed)
    print(json.dumps(report["loss_nats_per_token"]))
