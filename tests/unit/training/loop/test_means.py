"""A step's means over micro-batches and processes."""

from __future__ import annotations

import pytest
import torch

from lifelong_moe.training.loop import means
from lifelong_moe.training.loop.means import StepMeans

MASK = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_s_loss_is_the_mean_over_micro_batches_of_all_processes(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(means, "num_ranks", lambda: ranks)
    monkeypatch.setattr(means, "sum_over_ranks", lambda sums: ranks * sums)  # all processes have the same
    step = StepMeans()
    for loss in (1.0, 2.0, 6.0):
        step.add({"loss": torch.tensor(loss), "old": torch.tensor(loss)}, {"old": 0.5}, [], MASK)
    assert step.finish_step(torch.tensor(7.0)) == 7.0 and step.values == {"loss": 3.0, "old": 1.5}
    step.add({"loss": torch.tensor(5.0)}, {}, [], MASK)
    step.finish_step(torch.tensor(0.0))
    assert step.values == {"loss": 5.0}  # nothing is left of the step before
    with pytest.raises(RuntimeError, match="without a micro-batch"):
        step.finish_step(torch.tensor(0.0))
