"""The content address of a stage: its settings, its parent, and the hashes of its text. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.keys import content_key

SCHEMA = 5
"""Version of the content of a stage's key; a change makes every stage a new one."""


def stage_key(spec: StageSpec, parent_key: str | None, data: DataIdentity) -> str:
    """The stage's content address.

    Args:
        spec: The stage.
        parent_key: Key of the stage it continues.
        data: What it reads, and the tokenizer that made it.
    """
    return stored_key(spec.effective().to_json(), spec, parent_key, data)


def stored_key(written: Mapping[str, object], spec: StageSpec, parent_key: str | None, data: DataIdentity) -> str:
    """The content address of a stage that was committed under this schema.

    Args:
        written: Its specification just as it was stored, whatever this version would write in its place.
        spec: The same, read.
        parent_key: As for :func:`stage_key`.
        data: As for :func:`stage_key`.
    """
    content = dict(written)
    # An index in a run, which another run may not share; the parent's key stands below.
    del content["parent"]
    if isinstance(grow := content["grow"], Mapping):
        # A warning's threshold, without effect on weights.
        content["grow"] = {name: value for name, value in grow.items() if name != "min_share"}
    hashes = [[data.train_hashes[name] for name in names] for names in (spec.reads, spec.fisher_data, spec.mixed)]
    if spec.mixed:
        content["mixed"] = hashes[2]
    return content_key(
        {
            "schema": SCHEMA,
            "spec": {**content, "replayed": hashes[0], "fisher_data": hashes[1]},
            "parent": parent_key,
            "data": data.train_hashes[spec.data],
            "tokenizer": dataclasses.asdict(data.tokenizer),
        }
    )
