"""What keys may be at most and at least, and which of them shape a stage, by tables."""

from __future__ import annotations

from typing import Any

import pytest

from lifelong_moe.config.retention import (
    DistillConfig,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    ReplaySource,
    ReviewConfig,
    TrunkConfig,
    TrunkTraining,
)
from lifelong_moe.errors import ConfigError

LEAST, ALMOST = 1e-9, 1 - 1e-9


@pytest.mark.parametrize(
    ("section", "key", "legal", "refused"),
    [
        (TrunkConfig, "lr_scale", [LEAST, 1.0], [0.0, 1 + LEAST]),
        (TrunkConfig, "rank", [1], [0]),
        (DistillConfig, "weight", [0.0], [-LEAST]),
        (DistillConfig, "temperature", [LEAST], [0.0]),
        (DistillConfig, "fraction", [LEAST, 1.0], [0.0, 1 + LEAST]),
        (DistillConfig, "until", [LEAST, 1.0], [0.0, 1 + LEAST]),
        (DistillConfig, "student", [None, [0], [1, 3]], [[], [1, 0], [1, 1]]),
        (ReplayConfig, "fraction", [0.0, ALMOST], [-LEAST, 1.0]),
        (ReplayConfig, "buffer_tokens", [None, 1], [0]),
        (PenaltyConfig, "weight", [None, 0.0], [-LEAST]),
        (PenaltyConfig, "fisher_tokens", [1], [0]),
        (ReviewConfig, "fraction", [0.0, ALMOST], [-LEAST, 1.0]),
        (ReviewConfig, "replay_fraction", [LEAST, ALMOST], [0.0, 1.0]),
        (ReviewConfig, "old_loss", [0.0], [-LEAST]),
        (ReviewConfig, "lr_scale", [LEAST], [0.0]),
    ],
)
def test_the_ends_of_a_range(section: type[Any], key: str, legal: list[Any], refused: list[Any]) -> None:
    for value in legal:
        assert getattr(section(**{key: value}), key) == value
    for value in refused:
        with pytest.raises(ConfigError, match=rf"\.{key}=.* must "):
            section(**{key: value})


def test_written_text_fills_no_buffer() -> None:
    ReplayConfig(source=ReplaySource.generated)
    ReplayConfig(source=ReplaySource.stored, buffer_tokens=5)
    with pytest.raises(ConfigError, match=r"bounds stored text; .* Set replay\.buffer_tokens=null"):
        ReplayConfig(source=ReplaySource.generated, buffer_tokens=5)


def test_a_penalty_weighs_what_is_said_or_what_its_kind_does() -> None:
    assert {kind: PenaltyConfig(kind=kind).factor for kind in PenaltyKind} == {
        PenaltyKind.none: 0.0, PenaltyKind.l2: 0.1, PenaltyKind.ewc: 1000.0,
    }  # fmt: skip
    assert [PenaltyConfig(kind=kind, weight=0.0).factor for kind in PenaltyKind] == [0.0, 0.0, 0.0]
    for kind, tokens in ((PenaltyKind.none, 16_384), (PenaltyKind.l2, 16_384), (PenaltyKind.ewc, 7)):
        found = PenaltyConfig(kind=kind, fisher_tokens=7).effective()
        assert (found.kind, found.weight, found.fisher_tokens) == (kind, PenaltyConfig(kind=kind).factor, tokens)


@pytest.mark.parametrize(
    ("train", "lr_scale", "expected", "is_frozen"),
    [
        (TrunkTraining.full, 0.5, None, False),
        (TrunkTraining.gentle, 1.0, None, False),
        (TrunkTraining.gentle, 0.5, (0.5, 16), False),
        (TrunkTraining.frozen, 0.5, (0.1, 16), True),
        (TrunkTraining.frozen, 1.0, (0.1, 16), True),
        (TrunkTraining.deltas, 0.5, (0.1, 3), True),
    ],
)
def test_what_of_a_trunk_counts(
    train: TrunkTraining, lr_scale: float, expected: tuple[float, int] | None, is_frozen: bool
) -> None:
    written = TrunkConfig(train=train, lr_scale=lr_scale, rank=3)
    found = written.effective()
    assert (None if found is None else (found.lr_scale, found.rank)) == expected
    assert found is None or found.train == train
    assert written.is_frozen is is_frozen
