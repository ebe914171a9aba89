"""Check what a stage's files say of it: its key against all that the key hashes, and the numbers of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.plan.key import SCHEMA, stored_key
from lifelong_moe.storage.keys import content_key
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.store.record import StageRecord

MEASURED = ("tokens", "seconds", "tokens_per_second", "epochs", "trainable_parameters")
"""What the metrics of every trained stage tell, all numbers above zero."""


def require_own_key(record: StageRecord, spec: Mapping[str, Any]) -> None:
    """Compute a stage's key again, and require that it is the one that its record names.

    Stages of earlier versions, whose keys were hashes of something else, are taken at their word; their records have a
    form that no later one has.

    Args:
        record: The stage.
        spec: Its specification just as it is stored.

    Raises:
        PlainError: If it is another one, or a later version wrote the record.
    """
    if record.derived is not None and record.schema is not None:
        raise PlainError("a stage is either trained or derived")
    if record.key in record.borrowed.values() or record.parent == record.key:
        raise PlainError("the stage refers to itself")
    if record.removed is not None and (record.parent is None or record.borrowed):
        raise PlainError("a stage takes its parent's tensors, or names the holders of its own", ".removed")
    if record.derived is not None:
        found, origin = content_key(record.derived), record.derived.get("from")
        if origin != record.parent:
            raise PlainError("is not what the stage was derived from", ".parent")
    elif record.schema == SCHEMA:
        # `method=joint` once recorded tokens that fill no step; keys are of whole steps.
        found = _trained_key(record, {**spec, "tokens": record.spec.effective().tokens})
    elif record.schema is not None and record.schema > SCHEMA:
        raise PlainError(f"{record.schema} is of a later version of lifelong-moe; this one reads {SCHEMA}", ".schema")
    else:
        _require_earlier_form(record, spec)
        return
    if found != record.key:
        raise PlainError(f"{record.key} does not belong to the rest of the file, whose key is {found}", ".key")


def _require_earlier_form(record: StageRecord, spec: Mapping[str, Any]) -> None:
    # Records name the schema since its number 4, the split and the processes since later.
    if record.schema is None and (not record.read_near_copies or "processes" in spec):
        raise PlainError("missing", ".schema")
    if record.schema not in (None, 4):
        raise PlainError(f"{record.schema}, which no version has written", ".schema")


def _trained_key(record: StageRecord, spec: Mapping[str, Any]) -> str:
    if {*record.spec.uses} != {*record.data}:
        raise PlainError(f"must name {', '.join(record.spec.uses)}", ".data")
    architecture = record.architecture
    data = DataIdentity(record.data, record.tokenizer, architecture.vocab_size, architecture.bos_id)
    return stored_key(spec, record.spec, record.parent, data)


def measured(metrics: Any, record: StageRecord) -> dict[str, Any]:
    """The content of a stage's ``metrics.json``.

    Raises:
        PlainError: If it is something else.
    """
    if not isinstance(metrics, Mapping):
        raise PlainError("not the metrics of a stage")
    # Of derived stages nothing was measured.
    for name in MEASURED if record.derived is None else ():
        value = metrics.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise PlainError("must be a number above 0", f".{name}")
    return dict(metrics)
