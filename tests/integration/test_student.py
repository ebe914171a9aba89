"""A shallower student of the last stage's model, distilled until part of the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.shallow import shallow_student
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.ops.losses import distillation_loss
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.restore import load_model
from pipelines.inspect.generate import generate_text
from pipelines.shared.options import SamplingOptions
from tests.tiny import STEPS, tiny_config, train, write_config


def configure(**distill: Any) -> str:
    config = tiny_config(("fruit", "code", "fruit"))
    config["model"]["layers"] = 3
    config["stages"][2] |= {"distill": {"weight": 1.0, "text": "new", "student": [0, 2], **distill}, "name": "student"}
    return write_config(config)


def test_a_student_has_fewer_layers_and_learns(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, set[str]]] = []
    original = StageModule.training_step

    def training_step(self: StageModule, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        result: Any = original(self, batch, batch_idx)
        if self.spec.name == "student":
            parts.append((self.global_step, set(result["parts"])))
        return result

    monkeypatch.setattr(StageModule, "training_step", training_step)
    report, _ = train(configure(until=0.75))
    store = StageStore(Path("mlruns"))
    teacher, student = (load_model(store, store.get(stage["key"])) for stage in report["stages"][1:])
    assert (len(teacher.blocks), len(student.blocks)) == (3, 2)
    assert [g.stage for g in student.architecture.generations] == ["fruit", "code"]
    assert student.architecture.frozen == 0 and all(p.requires_grad for p in student.parameters())
    distilled = [step for step, names in parts if "distill_loss" in names]
    assert distilled == list(range(round(0.75 * STEPS)))  # and cross-entropy alone from then on
    assert len(parts) == STEPS
    untrained = shallow_student(teacher, [0, 2])
    assert not torch.equal(untrained.embedding.weight, student.embedding.weight)
    result = generate_text(
        "tiny", None, "apple", SamplingOptions(max_new_tokens=3, temperature=0.0), Console(quiet=True)
    )
    assert result["tokens"] <= 3
    assert report["stages"][2]["parameters_total"] < report["stages"][1]["parameters_total"]


def test_a_student_of_all_layers_is_its_teacher(make_model: Any) -> None:
    teacher = make_model("learned", (4, 2), model={"layers": 3}).eval()
    student = shallow_student(teacher, [0, 1, 2]).eval()
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs, ours = (m.head.logits(m(TokenBatch(ids)).hidden_BSD).flatten(0, 1) for m in (teacher, student))
    assert torch.equal(theirs, ours)
    loss = distillation_loss(ours, theirs.detach(), 2.0)
    assert abs(float(loss.detach())) < 1e-6
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    shallow = shallow_student(teacher, [0, 2])
    assert torch.equal(shallow.blocks[1].attention.query.weight, teacher.blocks[2].attention.query.weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages[2].distill.student=[0,9]", "must lie in 0 to 2"),
        ("stages[2].distill.student=[2,0]", "in ascending order"),
        ("stages[1].distill={weight: 1.0, text: new, student: [0]}", "is for the last stage"),
        ("routing.mode=hash", "needs a trained router"),
        ("stages[2].distill.until=0", r"until=0\.0 must lie in"),
        ("stages[2].distill.weight=0", "needs distill.weight above 0"),
    ],
)
def test_mistakes(lab: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(configure(), override)
