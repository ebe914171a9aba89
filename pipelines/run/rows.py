"""Points of a run and its stages in MLflow; names and units are those of :mod:`lifelong_moe.measures`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lifelong_moe.measures import MEASURES, Measure
from lifelong_moe.reports.report import Report, StageReport
from lifelong_moe.training.callbacks.points import Row

LEAST_SHARE = 0.01
"""A generation of less weight in predicting a text gets no point: there are as many pairs as stages times texts."""


def row(key: str, value: float, step: int, distribution: str = "") -> Row:
    """A point of a measure, in its unit; ``value`` as reports have it, where shares are fractions."""
    measure: Measure = MEASURES[key]
    return measure.of(distribution), measure.scale * value, step


def summary_rows(report: Report, before: Mapping[str, float]) -> list[Row]:
    """What the run has reached after its last stage, for the run's page, at step = stage index.

    Args:
        report: The run's, until this stage.
        before: The points of the stage before it, by metric.
    """
    index = len(report.stages) - 1
    losses = report.bits_per_byte[index]
    rows = [row("bits_per_byte", loss, index, name) for name, loss in zip(report.distributions, losses, strict=True)]
    lost, rises = report.forgetting_bits_per_byte, report.forgetting_rise()
    rows += [row("forgetting_bits_per_byte", value, index, name) for name, value in lost.items()]
    rows += [row("forgetting_rise", value, index, name) for name, value in rises.items()]
    for unit, values in (("_bits_per_byte", lost), ("", rises)):
        if values:
            rows.append(row(f"forgetting_max{unit}", max(values.values()), index))
            rows.append(row(f"forgetting_mean{unit}", sum(values.values()) / len(values), index))
    if report.forward_transfer_bits_per_byte is not None:
        rows.append(row("forward_transfer_bits_per_byte", report.forward_transfer_bits_per_byte, index))
    if losses:
        mean, tokens = sum(losses) / len(losses), sum(stage.tokens for stage in report.stages)
        rows += [row("final_mean_bits_per_byte", mean, index), row("heldout_over_tokens", mean, tokens)]
    for key in ("experts_per_layer", "parameters_total", "parameters_active", "parameters_trainable"):
        rows.append(row(key, float(getattr(report.stages[index], key)), index))
    return rows + _routing_rows(report, index, before)


def _routing_rows(report: Report, index: int, before: Mapping[str, float]) -> list[Row]:
    """How text is spread over experts and generations; the leak only where later experts could take text."""
    rows: list[Row] = []
    for name, statistics in report.routing.items():
        spread = dataclasses.asdict(statistics)
        rows += [row(key, float(spread[key]), index, name) for key in ("entropy", "max_over_mean", "unused_experts")]
    leaks = report.leaks()
    rows += [row("leak", leak, index, name) for name, leak in leaks.items()]
    if leaks:
        rows.append(row("leak_max", max(leaks.values()), index))
    for name, use in report.mixture.items():
        rows.append(row("readers", use.readers, index, name))
        for born, share in use.shares.items():
            metric, value, step = row("share", share, index, name)
            metric = metric.replace("STAGE", born)
            # Who had a weight gets a last point, so that no curve ends above where it is now.
            if share >= LEAST_SHARE or before.get(metric, 0.0) >= LEAST_SHARE * MEASURES["share"].scale:
                rows.append((metric, value, step))
    return rows


def cost_rows(stages: Sequence[StageReport], index: int) -> list[Row]:
    """What stages cost together, at step = stage index; energy is absent unless all of it was measured."""
    sums = {"tokens": "tokens", "active_flops": "active_flops", "seconds": "seconds"}
    rows = [row(key, float(sum(getattr(stage, field) for stage in stages)), index) for key, field in sums.items()]
    if all("energy_joules" in stage.training for stage in stages):
        rows.append(row("joules", sum(float(stage.training["energy_joules"]) for stage in stages), index))
    return rows


def usage_rows(tokens: int, flops: float, seconds: float, step: int, training: Mapping[str, object]) -> list[Row]:
    """What one stage used, and what no curve of its training says.

    Args:
        tokens: Trained on.
        flops: Of training.
        seconds: Of training.
        step: Of the points.
        training: Everything else that training measured.
    """
    rows = [row("own_tokens", float(tokens), step), row("own_flops", flops, step), row("own_seconds", seconds, step)]
    others = {"energy_joules": "own_joules"} | {
        key: key for key in ("joules_per_token", "new_expert_share", "assignment_churn")
    }
    for field, key in others.items():
        if isinstance(value := training.get(field), (int, float)):
            rows.append(row(key, float(value), step))
    passes = training.get("epochs_by_distribution")
    if isinstance(passes, Mapping):
        rows += [row("own_epochs", float(value), step, str(name)) for name, value in passes.items()]
    return rows
