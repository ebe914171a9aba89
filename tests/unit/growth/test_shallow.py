from __future__ import annotations

from collections.abc import Callable

import torch

from lifelong_moe.growth.shallow import shallow_student
from lifelong_moe.model.transformer import LanguageModel


def test_layers_are_copied_with_their_numbers(make_model: Callable[..., LanguageModel]) -> None:
    teacher = make_model("learned", (4, 2), model={"layers": 3})
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = shallow_student(teacher, [0, 2])
    assert len(student.blocks) == 2
    for name, tensor in student.state_dict().items():
        source = name.replace("blocks.1.", "blocks.2.")
        assert torch.equal(tensor, before[source]), name
        tensor.add_(1.0)  # of its own
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
