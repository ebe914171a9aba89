from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.config import TrunkConfig, TrunkTraining
from lifelong_moe.training.config import OptimConfig, Schedule
from lifelong_moe.training.optimizer import build_optimizer, freeze_trunk, rate_factor

Make = Callable[..., LanguageModel]
GENTLE, FROZEN, FULL = (TrunkConfig(train=train, lr_scale=0.25) for train in (
    TrunkTraining.gentle, TrunkTraining.frozen, TrunkTraining.full,
))  # fmt: skip


def test_cosine_by_hand() -> None:
    config = OptimConfig(warmup_fraction=0.2, min_lr_fraction=0.1)
    # Ten steps: two of warm-up at 1/3 and 2/3, then eight of the cosine from 1; half way it is the mean of both ends.
    found = [rate_factor(step, 10, config) for step in range(11)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[6] == pytest.approx(0.55)
    assert found[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[10] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)


def test_constant_by_hand() -> None:
    config = OptimConfig(schedule=Schedule.constant, warmup_fraction=0.1)
    assert [rate_factor(step, 10, config) for step in range(10)] == [0.5] + [1.0] * 9


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_never_zero_and_never_above_the_peak(warmup: float, steps: int) -> None:
    config = OptimConfig(warmup_fraction=warmup, min_lr_fraction=0.1)
    assert all(0.1 <= rate_factor(step, steps, config) <= 1.0 for step in range(steps + 1))


def groups(model: LanguageModel, trunk: TrunkConfig | None) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter that the optimizer knows, by name."""
    freeze_trunk(model, trunk)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.8, weight_decay=0.5), trunk)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_a_gentle_trunk(make_model: Make) -> None:
    found = groups(make_model("learned", (4, 2)), GENTLE)
    assert found["embedding.weight"] == (0.2, 0.5)
    assert found["blocks.1.attention.query.weight"] == (0.2, 0.5)
    assert found["blocks.0.moe_norm.weight"] == found["norm.weight"] == (0.2, 0.0)
    assert found["blocks.0.moe.banks.experts.4.down"] == found["blocks.0.moe.router.rows.1"] == (0.8, 0.5)


@pytest.mark.parametrize("trunk", [None, FULL])
def test_a_full_trunk(make_model: Make, trunk: TrunkConfig | None) -> None:
    found = groups(make_model("learned", (4, 2)), trunk)
    assert found["embedding.weight"] == found["blocks.1.moe.banks.experts.5.gate_up"] == (0.8, 0.5)
    assert found["norm.weight"] == (0.8, 0.0)


def test_a_frozen_trunk_leaves_the_newest_experts(make_model: Make) -> None:
    found = groups(make_model("learned", (4, 2)), FROZEN)
    assert set(found.values()) == {(0.8, 0.5)}
    assert {name.split(".moe.")[1] for name in found} == {
        "banks.experts.4.gate_up", "banks.experts.4.down", "banks.experts.5.gate_up", "banks.experts.5.down",
        "router.rows.1",
    }  # fmt: skip


@pytest.mark.parametrize("trunk", [None, GENTLE, FULL])
def test_frozen_experts_are_unknown_to_it(make_model: Make, trunk: TrunkConfig | None) -> None:
    model = make_model("learned", (4, 2))
    known = set(groups(model, trunk))
    assert known == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(f".experts.{e}." in name for name in known for e in range(4))
    assert "blocks.0.moe.router.rows.0" not in known


def test_tied_embeddings_are_known_once(make_model: Make) -> None:
    model = make_model(model={"tie_embeddings": True})
    optimizer = build_optimizer(model, OptimConfig(), GENTLE)
    known = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(known) == len(set(known)) and known.count(id(model.embedding.weight)) == 1


def test_nothing_to_train(make_model: Make) -> None:
    model = make_model()
    model.freeze_experts()
    with pytest.raises(ConfigError, match=r"nothing is left to train.*grow\.experts=0"):
        groups(model, FROZEN)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, "optim.lr=0.0 must be positive"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction=1.5 must lie in"),
        ({"min_lr_fraction": -0.1}, "optim.min_lr_fraction=-0.1 must lie in"),
        ({"beta1": 1.0}, "optim.beta1=1.0 must lie in"),
        ({"beta2": -0.1}, "optim.beta2=-0.1 must lie in"),
        ({"batch_tokens": 0}, "optim.batch_tokens=0 must be positive"),
        ({"weight_decay": -1.0}, "optim.weight_decay=-1.0 must not be negative"),
    ],
)
def test_values_out_of_range(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        OptimConfig(**keys)  # type: ignore[arg-type]
