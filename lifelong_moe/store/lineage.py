"""The lineage of a model: which stage created which experts, and from what data.

One expert is traced back in :mod:`lifelong_moe.store.trace`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.store.stages import CommittedStage, StageStore


@dataclass(frozen=True, kw_only=True)
class LineageRow:
    """A stage, its training data, and the generation that it added."""

    name: str
    """Of a run that begins with a checkpoint, the first is the checkpoint's."""
    key: str
    parent: str | None
    data: dict[str, str]
    """Hash of each distribution's training documents."""
    tokenizer: str
    """Hash of the tokenizer."""
    experts: str
    """Names of the experts that it added, abbreviated as by :func:`grouped_names`."""
    borrowed_tensors: int
    weights_sha256: str
    signed_by: str | None
    """Fingerprint of the key that signed it; None if it is unsigned."""
    signature_verified: bool
    """Whether the signature was checked, with a key that the user trusts; else it is a claim of the store."""
    checkpoint: Mapping[str, str] | None
    """Of a checkpoint its class of transformers, ``architecture``, and the ``sha256`` of its files."""


def lineage_rows(store: StageStore, keys: Sequence[str]) -> list[LineageRow]:
    """One row per stage.

    Args:
        store: Holds the stages.
        keys: Keys of a run's committed stages, oldest first.
    """
    found = [store.get(key) for key in keys]
    # The checkpoint is no stage of the run, which begins with it.
    if found and (first := store.chain(found[0].key)[0]).is_imported and first.key != found[0].key:
        found.insert(0, first)
    return [
        LineageRow(
            name=stage.name,
            key=stage.key,
            parent=stage.parent,
            data=stage.data,
            tokenizer=stage.tokenizer.hash,
            experts=expert_names(stage.architecture, stage.name),
            borrowed_tensors=len(store.holders(stage)),
            weights_sha256=stage.weights_hash,
            signed_by=store.signed_by(stage.key),
            signature_verified=bool(store.keys.public),
            checkpoint=_checkpoint(store, stage) if stage.is_imported else None,
        )
        for stage in found
    ]


def _checkpoint(store: StageStore, stage: CommittedStage) -> dict[str, str]:
    classes = Kept(partial(store.kept_text, stage)).config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else "unknown"
    return {"architecture": str(name), "sha256": str((stage.derived or {}).get("sha256"))}


def expert_names(architecture: Architecture, stage: str) -> str:
    """Names of the experts that a stage added, abbreviated: ``python_code/L0..3/E4..5``."""
    layers = range(architecture.model.layers)
    return grouped_names({stage: {layer: _born_in(architecture.expert_births(layer), stage) for layer in layers}})


def grouped_names(experts: Mapping[str, Mapping[int, list[int]]]) -> str:
    """Abbreviate the names of experts, given by birth stage and layer; ``none`` if there are none."""
    names = []
    for stage, by_layer in experts.items():
        # Adjacent layers with the same indices become one range; growth may give layers different numbers of experts.
        for found, layers in groupby(by_layer, key=lambda layer: by_layer[layer]):
            if found:
                names.append(f"{stage}/L{_range(list(layers))}/E{_range(found)}")
    return ", ".join(names) or "none"


def _born_in(births: list[str], stage: str) -> list[int]:
    return [expert for expert, birth in enumerate(births) if birth == stage]


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"


def work_under_way(work: Path) -> int | None:
    """Step of the newest step checkpoint under a stage's work directory; None if there is none."""
    # Names are step-<phase>-<step>, zero-padded, so they sort by age.
    found = sorted(path.name for path in work.glob("step-*") if re.fullmatch(r"step-([0-9]-)?[0-9]{8,12}", path.name))
    return int(found[-1].rsplit("-", 1)[1]) if found else None
