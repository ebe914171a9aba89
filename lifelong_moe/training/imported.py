"""The model of a checkpoint as a committed stage: what a run's first stage continues."""

from __future__ import annotations

from dataclasses import asdict

from lifelong_moe.config.data import BaseConfig, BaseStore
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.complete import checkpoint_hash
from lifelong_moe.interop.layout.folder import Checkpoint, read_checkpoint
from lifelong_moe.interop.layout.kept import kept_texts
from lifelong_moe.interop.layout.place import folder_of
from lifelong_moe.interop.pretrained import load_pretrained
from lifelong_moe.plan.methods import base_spec
from lifelong_moe.plan.planned import PlannedBase
from lifelong_moe.plan.spec import BASE_NAME
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.reference import REFERENCE, refer
from lifelong_moe.store.stages import CommittedStage, StageStore


def imported_stage(store: StageStore, planned: PlannedBase, config: RunConfig, data: PreparedData) -> CommittedStage:
    """Commit a checkpoint's model, or find it committed; then its folder is not looked at.

    Args:
        store: Where the stages are.
        planned: The model.
        config: The run that begins with it.
        data: For the tokenizer, which the stage keeps for all that continue it.

    Raises:
        CheckpointError: The folder is gone, or holds another checkpoint than it did.
    """
    if (found := store.find(planned.key)) is not None:
        return found
    checkpoint = _unchanged(config.base)
    model = load_pretrained(checkpoint, BASE_NAME)
    record = StageRecord(
        key=planned.key,
        name=BASE_NAME,
        parent=None,
        spec=base_spec(config),
        architecture=planned.architecture,
        data={},
        split={},
        tokenizer=data.identity.tokenizer,
        derived=dict(planned.identity),
    )
    kept, tensors = kept_texts(checkpoint.path), model.state_dict()
    if config.base.store == BaseStore.reference:
        reference = refer(checkpoint, config.base, {name: tuple(one.shape) for name, one in tensors.items()})
        kept |= {REFERENCE: canonical_json(asdict(reference))}
        tensors = {name: one for name, one in tensors.items() if name not in reference.tensors}
    return store.commit(record, {}, tensors, data.tokenizer.text, kept)


def _unchanged(base: BaseConfig) -> Checkpoint:
    found = read_checkpoint(folder_of(base))
    if checkpoint_hash(found) != base.sha256:
        raise CheckpointError(f"model.from={base.path} holds another checkpoint than when this run was configured.")
    return found
