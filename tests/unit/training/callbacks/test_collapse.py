"""Collapse by hand-made loads: which layers are named, when, and how often."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lifelong_moe.training.callbacks import collapse
from lifelong_moe.training.callbacks.collapse import MOST_WARNINGS, CollapseWarning, effective_experts

EVEN, FALLEN = [25, 25, 25, 25], [98, 1, 1, 0]


@pytest.mark.parametrize(
    ("loads", "expected"), [([5, 5, 5, 5], 4), ([10, 0, 0, 0], 1), ([7, 7, 0, 0], 2), ([8, 4, 4], 2**1.5), ([0, 0], 1)]
)
def test_effective_experts_by_hand(loads: list[int], expected: float) -> None:
    assert effective_experts(torch.tensor(loads)) == pytest.approx(expected)


def take(watch: CollapseWarning, architecture: Any, steps: range, loads: list[list[int]]) -> None:
    """Steps in which each layer has these loads."""
    module: Any = SimpleNamespace(model=SimpleNamespace(architecture=architecture))
    for step in steps:
        trainer: Any = SimpleNamespace(global_step=step)
        if step == 1:
            watch.on_train_start(SimpleNamespace(global_step=0), module)  # type: ignore[arg-type]
        watch.on_train_batch_end(trainer, module, {"loads": [torch.tensor(load) for load in loads]}, None, step - 1)


def test_a_layer_that_collapses_is_named_once(make_architecture: Any, caplog: pytest.LogCaptureFixture) -> None:
    watch, architecture = CollapseWarning("code", top_k=1, every_steps=5), make_architecture("learned", (4,))
    with caplog.at_level(logging.WARNING):
        take(watch, architecture, range(1, 6), [EVEN, EVEN])
        assert caplog.messages == []
        take(watch, architecture, range(6, 10), [EVEN, FALLEN])
        assert caplog.messages == []  # nothing is read before the window ends
        take(watch, architecture, range(10, 31), [EVEN, FALLEN])
    # exp(H) of 98, 1 and 1 hundredths is 1.119.
    assert caplog.messages == [
        "stage code: the router of layer 1 has collapsed in steps 6 to 10: one expert takes 98 % of the assignments, "
        "and 1.1 of 4 experts are in use. A larger routing.balance_loss or a smaller optim.lr may help."
    ]


def test_loads_are_read_at_the_points_of_the_curves_only(make_architecture: Any, monkeypatch: Any) -> None:
    read: list[torch.Tensor] = []

    def counted(counts_E: torch.Tensor) -> float:
        read.append(counts_E)
        return effective_experts(counts_E)

    monkeypatch.setattr(collapse, "effective_experts", counted)
    take(CollapseWarning("code", top_k=1, every_steps=5), make_architecture("learned", (4,)), range(1, 15), [EVEN] * 2)
    assert [counts_E.tolist() for counts_E in read] == [[5 * n for n in EVEN]] * 4  # two layers at two points


def test_warnings_are_few(make_architecture: Any, caplog: pytest.LogCaptureFixture) -> None:
    architecture = make_architecture("learned", (4,), model={"layers": 9})
    watch = CollapseWarning("code", top_k=1, every_steps=1)
    take(watch, architecture, range(1, 50), [FALLEN] * 9)
    assert len(caplog.messages) == MOST_WARNINGS


def test_experts_that_a_token_must_use_are_no_collapse(
    make_architecture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    take(CollapseWarning("a", top_k=2, every_steps=1), make_architecture("learned", (2,)), range(1, 3), [[50, 50]] * 2)
    # With bundles new text has its generation's four experts alone, and those of other text are not missed.
    bundles = make_architecture("bundles", (4, 4))
    take(CollapseWarning("b", top_k=2, every_steps=1), bundles, range(1, 3), [[0] * 4 + EVEN] * 2)
    assert caplog.messages == []
    take(CollapseWarning("c", top_k=2, every_steps=1), bundles, range(1, 2), [[0] * 4 + [50, 50, 0, 0], [0] * 4 + EVEN])
    assert len(caplog.messages) == 1 and "layer 0" in caplog.messages[0] and "2.0 of 4" in caplog.messages[0]


def test_experts_that_train_are_judged_alone(make_architecture: Any, caplog: pytest.LogCaptureFixture) -> None:
    grown = make_architecture("learned", (16, 4))
    assert grown.frozen == 1
    # All new text goes to new experts, which share it; nothing is wrong.
    take(CollapseWarning("a", top_k=2, every_steps=1), grown, range(1, 3), [[0] * 16 + EVEN] * 2)
    # Nothing goes to them: they are dead, which is another warning.
    take(CollapseWarning("b", top_k=2, every_steps=1), grown, range(1, 3), [[9] * 16 + [0] * 4] * 2)
    assert caplog.messages == []
    # Replayed text, spread over old experts, hides nothing.
    take(CollapseWarning("c", top_k=1, every_steps=1), grown, range(1, 2), [[50] * 16 + FALLEN] * 2)
    assert len(caplog.messages) == 2 and "1.1 of 4" in caplog.messages[0]


def test_where_a_token_uses_all_experts_none_can_be_left_out(make_architecture: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        watch = CollapseWarning("code", top_k=4, every_steps=5)
        take(watch, make_architecture("learned", (4,)), range(1, 6), [FALLEN, FALLEN])
    assert caplog.messages == []
