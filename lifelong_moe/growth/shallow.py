"""A shallower student of a model: some of its layers, as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lifelong_moe.model.transformer import LanguageModel

_LAYER = re.compile(r"blocks\.(\d+)\.(.*)")


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
        match = _LAYER.fullmatch(name)
        source = name if match is None else f"blocks.{layers[int(match[1])]}.{match[2]}"
        numbers[name] = theirs[source]
    student.load_state_dict(numbers)
    return student
