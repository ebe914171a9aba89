"""Require that stored tensors are those of the model that a stored architecture describes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.buckets import add_missing_tables


def require_fitting(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Require the names, shapes and kinds of numbers of a model's own tensors.

    Args:
        model: As it was built from the architecture.
        tensors: What is about to be loaded into it; without memory if it is to be read.

    Raises:
        CorruptError: Naming the first tensor that differs, is missing, or holds a number that is not finite.
    """
    found = dict(tensors)
    add_missing_tables(found, model.table_names)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ found.keys()):
        is_missing = name in expected
        raise CorruptError(f"tensor {name} is {'missing' if is_missing else 'none of the architecture'}.")
    for name, ours in expected.items():
        theirs = found[name]
        # Copying would take whole numbers for weights in silence. Weights may be stored in fewer bits.
        is_alike = theirs.dtype == ours.dtype or (theirs.is_floating_point() and ours.is_floating_point())
        if theirs.shape != ours.shape or not is_alike:
            raise CorruptError(f"tensor {name} is {_form(theirs)}, but the architecture says {_form(ours)}.")
        # What has no memory is looked at when it is read.
        if not theirs.is_meta and not bool(torch.isfinite(theirs).all()):
            raise CorruptError(f"tensor {name} holds a number that is not finite.")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
