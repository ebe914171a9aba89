"""Names and values that MLflow accepts."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path

import pytest

from lifelong_moe.errors import DivergedError, LockedError, ResourceError, TryAgainError
from lifelong_moe.tracking.values import clean_key, cut, flatten_params, split_finite, status_after


class Mode(Enum):
    learned = "learned"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("eval/wiki_en/bits_per_byte", "eval/wiki_en/bits_per_byte"),
        ("loss (nats)", "loss _nats_"),
        ("a//b/", "a/b"),
        ("../a/./b", "a/b"),
        ("/", "_"),
        ("", "_"),
        ("x" * 300, "x" * 250),
        ("x" * 249 + "/y", "x" * 249),
    ],
)
def test_keys_become_legal(key: str, expected: str) -> None:
    assert clean_key(key) == expected


def test_text_is_cut_visibly_and_only_if_too_long() -> None:
    assert cut("x" * 100, 100) == "x" * 100
    shortened = cut("x" * 101, 100)
    assert len(shortened) == 100
    assert shortened.endswith("… [cut, 101 characters]")


def test_params_are_flat_and_numbers_stay_numbers() -> None:
    params = {
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
        "stages": [{"tokens": 500_000}, {"tokens": 1, "data": Path("x/y")}],
        "mode": Mode.learned,
        "distill": None,
        "deterministic": True,
        "empty": {},
        "none_here": [],
    }
    assert flatten_params(params) == {
        "optim.lr": "0.001",
        "optim.betas": "[0.9, 0.95]",
        "stages.0.tokens": "500000",
        "stages.1.tokens": "1",
        "stages.1.data": "x/y",
        "mode": "learned",
        "distill": "null",
        "deterministic": "true",
        "empty": "{}",
        "none_here": "[]",
    }


def test_long_params_are_cut_and_colliding_keys_both_kept() -> None:
    long = "x" * 249
    flat = flatten_params({"a!": 1, "a?": "y" * 7000, long + "!": 1, long + "?": 2, long + "#": 3})
    assert flat["a_"] == "1"
    assert len(flat["a__"]) == 6000
    assert len(flat) == 5
    assert all(len(key) <= 250 for key in flat)


def test_what_is_not_finite_is_replaced_by_its_absence() -> None:
    kept, absent = split_finite([("loss", 1.5, 0), ("loss", math.nan, 1), ("grad!", math.inf, 2)])
    assert kept == [("loss", 1.5, 0), ("loss_absent", 1.0, 1), ("grad__absent", 1.0, 2)]
    assert absent == [("loss", 1), ("grad!", 2)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (TryAgainError("stopped by SIGTERM"), "KILLED"),
        (LockedError("another process is at it"), "KILLED"),
        (DivergedError("no finite gradient"), "FAILED"),
        (ResourceError("no space left"), "FAILED"),
        (OSError(28, "No space left on device"), "FAILED"),
        (ZeroDivisionError(), "FAILED"),
    ],
)
def test_a_run_failed_if_something_must_be_mended(error: BaseException | None, status: str) -> None:
    assert status_after(error) == status
