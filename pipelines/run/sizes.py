"""What a plan says of sizes: the checkpoint that comes in, and what each stage adds, trains, freezes and holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.layout.place import folder_of
from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.plan.memory import MemoryNeed, memory_need
from lifelong_moe.plan.spec import BASE
from pipelines.run.render import millions
from pipelines.shared.workspace import Prepared

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Incoming(TypedDict):
    """A checkpoint as it comes in."""

    path: str
    architecture: str
    """Class of transformers."""
    parameters: int
    """Of our model of it."""
    dtype: str
    bytes: int
    """Of its files' numbers."""
    vocabulary: int
    """Rows of its embedding."""
    context: int
    """Positions that it was made for."""


class Sizes(TypedDict):
    """Of a stage, in tokens, parameters and bytes."""

    tokens_added: int
    """Tokens that it adds to the vocabulary."""
    parameters_added: int
    parameters_frozen: int
    memory: dict[str, int]
    """What tensors take at least, by kind."""


def incoming(prepared: Prepared) -> Incoming | None:
    """The checkpoint that a run begins with; None if there is none.

    Raises:
        CheckpointError: If its folder is gone or damaged.
    """
    base, path = prepared.base, prepared.config.base.path
    if base is None or path is None:
        return None
    found = read_checkpoint(folder_of(prepared.config.base))
    return {
        "path": path,
        "architecture": found.family.class_name,
        "parameters": count_parameters(base.architecture).total,
        "dtype": " and ".join(DTYPES[kind] for kind in sorted(found.dtypes)),
        "bytes": found.num_bytes,
        "vocabulary": found.family.vocab_size,
        "context": found.model.context,
    }


def sizes(prepared: Prepared, index: int) -> Sizes:
    """What a planned stage adds, freezes and holds."""
    planned, before = prepared.plan[index], 0
    if planned.spec.parent is not None:
        base = prepared.base if planned.spec.parent == BASE else None
        before = count_parameters((base or prepared.plan[planned.spec.parent]).architecture).total
    total = planned.parameters.total
    need = memory_need(planned.spec, planned.architecture, prepared.config.trainer)
    return {
        "tokens_added": planned.tokens_added,
        "parameters_added": total - before,
        "parameters_frozen": total - planned.trainable,
        "memory": _by_kind(need),
    }


def _by_kind(need: MemoryNeed) -> dict[str, int]:
    kinds = {"weights": need.weights, "gradients and moments": need.training, "activations": need.activations}
    return kinds | {"logits": need.logits, "text": need.text, "loaders": need.loaders}


def sentences(prepared: Prepared, came: Incoming | None, found: list[Sizes]) -> Iterator[str]:
    """One line on the checkpoint, and one on each stage."""
    if came is not None:
        own = prepared.config.model.context
        yield (
            f"{came['path']}: {came['architecture']}, {millions(came['parameters'])} parameters, {came['dtype']} "
            f"({came['bytes'] / 1e6:,.1f} MB), vocabulary {came['vocabulary']:,}, context {came['context']:,}"
            f"{'' if own == came['context'] else f' ({own:,} here)'}"
        )
    for planned, one in zip(prepared.plan, found, strict=True):
        added, total = one["parameters_added"], planned.parameters.total
        if planned.spec.parent is None:
            adds = f"begins with {millions(total)} parameters"
        else:
            adds = f"adds {millions(added)} parameters ({added / (total - added):+.1%})"
            adds += f" and {one['tokens_added']:,} tokens" if one["tokens_added"] else ""
        held = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in one["memory"].items() if size)
        yield (
            f"{planned.spec.name}: {adds}, trains {millions(planned.trainable)}, freezes "
            f"{millions(one['parameters_frozen'])}; holds at least {sum(one['memory'].values()) / 1e6:,.1f} MB: {held}"
        )
