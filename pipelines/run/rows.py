"""Points of a stage in MLflow: what it measured, what it cost, and how it used the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lifelong_moe.reports.report import Report, StageReport
from lifelong_moe.training.callbacks.points import Row


def summary_rows(report: Report, index: int) -> list[Row]:
    """A stage's summary as points at step = stage index, the same on parent and child."""
    rows: list[Row] = []
    stage, last = report.stages[index], index
    for j, name in enumerate(report.distributions):
        rows.append((f"eval/{name}/nats_per_token", report.loss_nats_per_token[last][j], index))
        rows.append((f"eval/{name}/bits_per_byte", report.bits_per_byte[last][j], index))
    rows += [(f"forgetting/{name}", value, index) for name, value in report.forgetting.items()]
    for name, statistics in report.routing.items():
        rows += [
            (f"routing/{name}/{key}", float(value), index) for key, value in dataclasses.asdict(statistics).items()
        ]
    for name, use in report.mixture.items():
        rows.append((f"mixture/{name}/readers", use.readers, index))
        rows += [(f"mixture/{name}/share/{born}", share, index) for born, share in use.shares.items()]
    transfers = {"backward_transfer": report.backward_transfer, "forward_transfer": report.forward_transfer}
    rows += [(f"summary/{key}", value, index) for key, value in transfers.items() if value is not None]
    if report.distributions:
        mean = sum(report.bits_per_byte[last]) / len(report.distributions)
        rows.append(("summary/mean_bits_per_byte", mean, index))
    for key in ("experts_per_layer", "parameters_total", "parameters_active", "parameters_trainable"):
        rows.append((f"size/{key}", float(getattr(stage, key)), index))
    return rows


def cost_rows(stages: Sequence[StageReport], index: int) -> list[Row]:
    """What stages cost together, at step = stage index; energy is absent unless all of it was measured."""
    tokens, flops = sum(stage.tokens for stage in stages), sum(stage.active_flops for stage in stages)
    rows = cost(tokens, flops, sum(stage.seconds for stage in stages), index)
    if all("energy_joules" in stage.training for stage in stages):
        rows.append(("cost/joules", sum(float(stage.training["energy_joules"]) for stage in stages), index))
    return rows


def cost(tokens: int, flops: float, seconds: float, step: int) -> list[Row]:
    """Points of a cost, of one stage or of several."""
    return [("cost/tokens", float(tokens), step), ("cost/flops", float(flops), step), ("cost/seconds", seconds, step)]


def usage_rows(stage: StageReport, index: int) -> list[Row]:
    """How a stage used the device and its text, at step = stage index."""
    rows: list[Row] = [("usage/tokens_per_second", float(stage.tokens_per_second), index)]
    counted = ("nonfinite_steps", "skipped_spikes", "rollbacks")
    rates = ("flops_per_second", "joules_per_token")
    for key in ("data_fraction", *counted, *rates, "new_expert_share", "assignment_churn"):
        if key in stage.training:
            rows.append((f"usage/{key}", float(stage.training[key]), index))
    return rows
