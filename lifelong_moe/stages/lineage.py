"""Which stage, on which data, bore which experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lifelong_moe.stages.store import StageStore


def lineage_rows(store: StageStore, keys: list[str]) -> list[dict[str, Any]]:
    """One entry a stage, oldest first.

    Args:
        store: Where the stages are.
        keys: Keys of a run's committed stages, in order.

    Returns:
        ``name``, ``key``, ``parent``, ``data`` (hash of each distribution's training documents), ``tokenizer``,
        ``experts`` (names of the experts born there, ``STAGE/L<layer>/E<index>``, in short), ``borrowed_tensors`` and
        ``weights_sha256``.
    """
    rows = []
    for key in keys:
        stage = store.get(key)
        architecture = stage.config["architecture"]
        layers, first, born = architecture["model"]["layers"], 0, "none"
        for generation in architecture["generations"]:
            if generation["stage"] == stage.name:
                born = expert_names(stage.name, layers, first, generation["experts"])
            first += generation["experts"]
        rows.append(
            {
                "name": stage.name,
                "key": key,
                "parent": stage.config["parent"],
                "data": stage.config["data"],
                "tokenizer": stage.config["tokenizer"]["hash"],
                "experts": born,
                "borrowed_tensors": len(stage.config["borrowed"]),
                "weights_sha256": stage.weights_hash,
            }
        )
    return rows


def expert_names(stage: str, layers: int, first: int, count: int) -> str:
    """Names of a generation's experts, ranges written with two dots: ``python_code/L0..3/E4..5``."""
    return f"{stage}/L{_range(0, layers)}/E{_range(first, count)}"


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}..{first + count - 1}"


def work_under_way(work: Path) -> int | None:
    """Step of the newest step checkpoint under a stage's work directory; None if there is none."""
    found = sorted(work.glob("step-*"))
    return int(found[-1].name.rsplit("-", 1)[1]) if found else None
