"""Compare arms by their runs' reports. Pure: plain JSON data in and out.

Keys of ``comparison.json`` (schema 1; earlier versions wrote no range over seeds, and no ``…_bits_per_byte`` of
forgetting and gaps). A value that needs an absent run or reference is null.

=====================  ========================================================================================
``schema``             1
``compare``            name
``budget``             what is equal between arms: ``tokens`` or ``flops``
``base``               the run configuration that all arms begin with
``overrides``          of every arm, from the command line
``seeds``              of each arm
``reference``          arm that differences are taken against
``unrestrained``       arm that the plasticity gap is taken against; null if there is none
``joint``              arm that the oracle gap is taken against; null if there is none
``distributions``      all that any arm was measured on, in order of first use
``complete``           whether every arm has a committed run with every seed
``arms``               a list, one object an arm: ``name``, ``method``, ``overrides``, ``stages`` (names),
                       ``learned_after`` ({distribution: index of the last stage that learned it}), ``runs`` (one a
                       seed, below), ``summary`` ({number: over seeds, below}), ``differences`` ({number: arm minus
                       reference with the same seeds, below}; null for the reference)
``runs``               ``run``, ``seed``, ``status`` (``committed``, ``failed``, ``absent``), ``reason`` (why it
                       failed), and where committed: ``numbers`` (below), ``forgetting``, ``plasticity_gap``,
                       ``oracle_gap`` ({distribution: nats per token}), ``forgetting_bits_per_byte`` (the same in that
                       unit), ``leak`` ({distribution: share}; without those that no later experts could take text of),
                       ``final_bits_per_byte`` ({distribution: after the last stage}) and ``curves``
                       ({distribution: bits per byte after each stage})
over seeds             {``mean``, ``low``, ``high``, ``n``, ``lowest``, ``highest``}: mean, 95 % t-interval (null for
                       n = 1) and range
differences            the same of the paired differences, and ``p`` of the paired t-test; null for fewer than two
                       common seeds, where seeds count in which both arms' number is one over the same
                       distributions. Many arms make many tests: p is not corrected for that
=====================  ========================================================================================

``numbers`` of a run. A gap is a relative rise of perplexity, ``exp(nats per token) − 1``; positive is worse:

=====================================  ================================================================================
``forgetting_max``                     of the largest ``R[last, j] − R[j, j]`` over old distributions, those that the
                                       last stage did not learn; null with one stage
``forgetting_mean``                    of their mean
``plasticity_gap``                     of the largest ``R[j, j] − R_unrestrained[j, j]`` over what was learned from the
                                       second stage on, same seed
``plasticity_gap_mean``                of their mean
``oracle_gap``                         of the mean of ``R[last, j] − R_joint[j]`` over learned distributions, same seed
``forgetting_max_bits_per_byte``       as ``forgetting_max``, as a difference of bits per byte of source text, and so
                                       are the next four
``forgetting_mean_bits_per_byte``      as ``forgetting_mean``
``plasticity_gap_bits_per_byte``       as ``plasticity_gap``
``plasticity_gap_mean_bits_per_byte``  as ``plasticity_gap_mean``
``oracle_gap_bits_per_byte``           as ``oracle_gap``
``final_mean_nats``                    mean over distributions of nats per token after the last stage
``final_mean_bits_per_byte``           the same in bits per byte of source text
``leak_max``                           largest router leak of an old distribution; null where the model did not grow
``tokens``                             trained on by the arm's chain of stages, replayed ones included
``active_flops``                       of training them, the teacher's included
``scratch_tokens``                     trained on by models from scratch beside the chain (method ``unrestrained``),
                                       which no other number includes
``scratch_active_flops``               of training those
``parameters_total``                   of the final model
``parameters_active``                  of them, used by one token
``epochs_max``                         most passes over a stage's own text
``seconds``                            of training, shared stages included
=====================================  ================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lifelong_moe.reports.seeds import PairedDifference, over_seeds, paired

SCHEMA = 1
Report = Mapping[str, Any]
NATS, BITS = "loss_nats_per_token", "bits_per_byte"
"""The loss matrices of a report."""
OVER = {
    "forgetting_max": "forgetting",
    "forgetting_mean": "forgetting",
    "plasticity_gap": "plasticity_gap",
    "plasticity_gap_mean": "plasticity_gap",
    "oracle_gap": "oracle_gap",
    "final_mean_nats": "final_bits_per_byte",
    "final_mean_bits_per_byte": "final_bits_per_byte",
    "leak_max": "forgetting",
}
"""For numbers that summarize distributions, the part of a run's measures that names them."""
OVER |= {f"{key}_bits_per_byte": part for key, part in OVER.items() if not key.startswith(("final", "leak"))}


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm so far."""

    name: str
    method: str
    overrides: tuple[str, ...]
    runs: Mapping[int, str]
    """Name of the run of each seed."""
    reports: Mapping[int, Report]
    """Report of each committed seed."""
    failed: Mapping[int, str]
    """Why a seed's run failed."""


@dataclass(frozen=True)
class RunMeasures:
    """The measures of one committed run; the tables above list them."""

    numbers: Mapping[str, float | None]
    forgetting: Mapping[str, float]
    plasticity_gap: Mapping[str, float] | None
    oracle_gap: Mapping[str, float] | None
    forgetting_bits_per_byte: Mapping[str, float]
    leak: Mapping[str, float]
    final_bits_per_byte: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]

    def distributions_of(self, number: str) -> set[str]:
        """Distributions that a number summarizes; empty for a number of the whole run."""
        return set(getattr(self, OVER[number]) or ()) if number in OVER else set()


Measured = Mapping[int, RunMeasures]
"""Measures of an arm's committed runs, by seed."""


def build_comparison(
    arms: Sequence[ArmResult], *, reference: str, unrestrained: str | None = None, joint: str | None = None
) -> dict[str, Any]:
    """Compare the runs committed so far.

    Args:
        arms: In the order of the table.
        reference: Arm that differences are taken against.
        unrestrained: Arm without any retention; by default the first of method ``unrestrained``, else the first
            of method ``sequential``.
        joint: Arm that learned everything at once; by default the first of method ``joint``.

    Returns:
        The keys of the table above from ``reference`` on.
    """
    unrestrained = unrestrained or _first(arms, "unrestrained") or _first(arms, "sequential")
    joint = joint or _first(arms, "joint")
    # The reference of a gap is an arm like any other, so each arm has a gap of its own, 0 for the reference itself.
    reports = {arm.name: arm.reports for arm in arms}
    free, oracle = (reports[role] if role else {} for role in (unrestrained, joint))
    # An arm is compared with references of the same seed, which saw the same data in the same order.
    measured: dict[str, Measured] = {
        arm.name: {
            seed: measure(arm.reports[seed], free.get(seed), oracle.get(seed))
            for seed in arm.runs
            if seed in arm.reports
        }
        for arm in arms
    }
    base = measured[reference]
    rows = [_row(arm, measured[arm.name], None if arm.name == reference else base) for arm in arms]
    return {
        "reference": reference,
        "unrestrained": unrestrained,
        "joint": joint,
        "distributions": list(
            dict.fromkeys(d for arm in arms for r in arm.reports.values() for d in r["distributions"])
        ),
        "complete": all(seed in arm.reports for arm in arms for seed in arm.runs),
        "arms": rows,
    }


def _first(arms: Sequence[ArmResult], method: str) -> str | None:
    return next((arm.name for arm in arms if arm.method == method), None)


def _row(arm: ArmResult, measured: Measured, base: Measured | None) -> Mapping[str, Any]:
    """An arm's entry in the file; ``base`` is None for the reference itself."""
    numbers = [one.numbers for one in measured.values()]
    summary = {key: over_seeds([one[key] for one in numbers]) for key in (numbers[0] if numbers else ())}
    differences = None if base is None else _differences(measured, base)
    report = next(iter(arm.reports.values()), None)
    return {
        "name": arm.name,
        "method": arm.method,
        "overrides": list(arm.overrides),
        "stages": [stage["name"] for stage in report["stages"]] if report else [],
        "learned_after": learned_rows(report) if report else {},
        "runs": [_run(arm, seed, measured.get(seed)) for seed in arm.runs],
        "summary": {key: found and asdict(found) for key, found in summary.items()},
        "differences": differences and {key: found and asdict(found) for key, found in differences.items()},
    }


def _run(arm: ArmResult, seed: int, measures: RunMeasures | None) -> Mapping[str, Any]:
    # A failure of an earlier attempt no longer counts once the run is committed.
    reason = None if measures else arm.failed.get(seed)
    status = "committed" if measures else "failed" if reason else "absent"
    row = {"run": arm.runs[seed], "seed": seed, "status": status, "reason": reason}
    return row | asdict(measures) if measures else row


def measure(report: Report, free: Report | None, oracle: Report | None) -> RunMeasures:
    """Measure one run.

    Args:
        report: Report of the run.
        free: Report of the unrestrained run with the same seed.
        oracle: Report of the joint run with the same seed.
    """
    names, stages = report["distributions"], report["stages"]
    # What the last stage learned has not been followed by anything, so it cannot be forgotten yet.
    forgetting = {name: value for name, value in report["forgetting"].items() if name in old_distributions(report)}
    rows = learned_rows(report)
    lost = {name: _loss(report, -1, name, BITS) - _loss(report, rows[name], name, BITS) for name in forgetting}
    plasticity, plasticity_bits = (_plasticity_gap(report, free, unit) if free else None for unit in (NATS, BITS))
    above, above_bits = (_oracle_gap(report, oracle, unit) if oracle else None for unit in (NATS, BITS))
    leak = {name: report["routing"][name]["leak"] for name in _left_to_later_experts(report)}
    numbers = {
        "forgetting_max_bits_per_byte": _over(max, lost),
        "forgetting_mean_bits_per_byte": _over(_mean, lost),
        "plasticity_gap_bits_per_byte": _over(max, plasticity_bits),
        "plasticity_gap_mean_bits_per_byte": _over(_mean, plasticity_bits),
        "oracle_gap_bits_per_byte": _over(_mean, above_bits),
        "forgetting_max": _relative(max, forgetting),
        "forgetting_mean": _relative(_mean, forgetting),
        "plasticity_gap": _relative(max, plasticity),
        "plasticity_gap_mean": _relative(_mean, plasticity),
        "oracle_gap": _relative(_mean, above),
        "final_mean_nats": _mean(report["loss_nats_per_token"][-1]),
        "final_mean_bits_per_byte": _mean(report["bits_per_byte"][-1]),
        "leak_max": max(leak.values(), default=None),
        "tokens": sum(stage["tokens"] for stage in stages),
        "active_flops": sum(stage["active_flops"] for stage in stages),
        "scratch_tokens": _total(report["from_scratch"], "tokens"),
        "scratch_active_flops": _total(report["from_scratch"], "active_flops"),
        "parameters_total": stages[-1]["parameters_total"],
        "parameters_active": stages[-1]["parameters_active"],
        "epochs_max": max(stage["epochs"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
    }
    return RunMeasures(
        numbers=numbers,
        forgetting=forgetting,
        plasticity_gap=plasticity,
        oracle_gap=above,
        forgetting_bits_per_byte=lost,
        leak=leak,
        final_bits_per_byte=dict(zip(names, report["bits_per_byte"][-1], strict=True)),
        curves={name: [row[j] for row in report["bits_per_byte"]] for j, name in enumerate(names)},
    )


def learned_rows(report: Report) -> dict[str, int]:
    """For each learned distribution, the row of the last stage that learned it."""
    learned = [stage["learns"] for stage in report["stages"]]
    # Learned again later, a distribution is measured from there on.
    return {name: max(i for i, names in enumerate(learned) if name in names) for name in report["forgetting"]}


def old_distributions(report: Report) -> list[str]:
    """Learned distributions that the last stage did not learn."""
    last = len(report["stages"]) - 1
    return [name for name, row in learned_rows(report).items() if row < last]


def _left_to_later_experts(report: Report) -> list[str]:
    """Distributions after which the model grew: for any other, no expert is a later one."""
    # Where generations predict together, a text is no generation's own.
    if report.get("mixture"):
        return []
    experts = [stage["experts_per_layer"] for stage in report["stages"]]
    return [name for name, row in learned_rows(report).items() if experts[-1] > experts[row]]


def _plasticity_gap(report: Report, free: Report, unit: str) -> dict[str, float]:
    """``R[j, j] − R_unrestrained[j, j]`` of what both learned from their second stage on."""
    rows, free_rows = learned_rows(report), learned_rows(free)
    # The first stage has nothing to retain, so no method holds it back.
    common = [name for name, row in rows.items() if row > 0 and free_rows.get(name, 0) > 0]
    return {name: _loss(report, rows[name], name, unit) - _loss(free, free_rows[name], name, unit) for name in common}


def _oracle_gap(report: Report, oracle: Report, unit: str) -> dict[str, float] | None:
    """``R[last, j] − R_joint[j]``; None unless the joint run learned all that this one did."""
    names = list(report["forgetting"])
    # A joint run that learned less had more tokens for each distribution: no upper bound.
    if not set(names) <= set(oracle["forgetting"]):
        return None
    return {name: _loss(report, -1, name, unit) - _loss(oracle, -1, name, unit) for name in names}


def _loss(report: Report, row: int, name: str, unit: str) -> float:
    return report[unit][row][report["distributions"].index(name)]


def _relative(reduce: Any, nats: Mapping[str, float] | None) -> float | None:
    # expm1: exact also for the small differences that a good method shows.
    return None if (found := _over(reduce, nats)) is None else math.expm1(found)


def _over(reduce: Any, values: Mapping[str, float] | None) -> float | None:
    return reduce(values.values()) if values else None


def _total(models: Mapping[str, Mapping[str, Any]], field: str) -> Any:
    """Sum of a field over models."""
    # Reports of earlier versions lack some fields: the sum is then unknown.
    values = [model.get(field) for model in models.values()]
    return None if None in values else sum(values)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _differences(ours: Measured, theirs: Measured) -> dict[str, PairedDifference | None]:
    keys = list(next(iter(ours.values())).numbers) if ours else []
    found = {}
    for key in keys:
        # A mean over other distributions is another quantity: such seeds do not count.
        same = [
            seed
            for seed in ours
            if seed in theirs and ours[seed].distributions_of(key) == theirs[seed].distributions_of(key)
        ]
        found[key] = paired(*({seed: runs[seed].numbers[key] for seed in same} for runs in (ours, theirs)))
    return found
