"""A shallower student: a copy of some of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lifelong_moe.config.parts import TensorName
from lifelong_moe.model.transformer import LanguageModel


def shallow_student(model: LanguageModel, layers: Sequence[int]) -> LanguageModel:
    """A model of these layers, initialized with copies of the model's tensors.

    Args:
        model: Not changed.
        layers: Indices of the layers to copy, ascending.

    Source:
        Mixture-of-Students: DeepSpeed-MoE (arXiv:2201.05596), section 4.2, which drops an eighth of the layers.
    """
    student = LanguageModel(model.architecture.shallow(layers))
    theirs, tensors = model.state_dict(), {}
    for name in student.state_dict():
        mine = TensorName.parse(name)
        # Student's layer i is layer layers[i] of the model; embedding, norm and head have no layer.
        source = mine if mine.layer is None else replace(mine, layer=layers[mine.layer])
        tensors[name] = theirs[str(source)]
    student.load_state_dict(tensors)
    return student
