"""A shallower student of a model: some of its layers, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lifelong_moe.config.parts import TensorName
from lifelong_moe.model.transformer import LanguageModel


def shallow_student(model: LanguageModel, layers: Sequence[int]) -> LanguageModel:
    """A model of these layers with copies of the model's numbers.

    Args:
        model: Left as it is.
        layers: Indices of its layers, ascending.

    Source:
        Mixture-of-Students: DeepSpeed-MoE (arXiv:2201.05596), section 4.2, there with an eighth of the layers less.
    """
    student = LanguageModel(model.architecture.shallow(layers))
    theirs, numbers = model.state_dict(), {}
    for name in student.state_dict():
        mine = TensorName.parse(name)
        source = mine if mine.layer is None else replace(mine, layer=layers[mine.layer])
        numbers[name] = theirs[str(source)]
    student.load_state_dict(numbers)
    return student
