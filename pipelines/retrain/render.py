"""A tick's plan and outcome in words, on the terminal and in MLflow."""

from __future__ import annotations

from rich.console import Console

from lifelong_moe.measures import duration
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.predicted import Power
from lifelong_moe.storage.keys import SHORT
from pipelines.retrain.outcome import TickOutcome
from pipelines.retrain.plan_file import PlanFacts
from pipelines.shared.markdown import plain


def plan_sentences(facts: PlanFacts) -> list[str]:
    """Findings, decision with reasons, and cost of a plan, a sentence each."""
    sentences = [f"Batch {facts.batch[:SHORT]}: {facts.documents} documents never seen before."]
    if facts.looks is not None:  # plans of earlier versions have none
        sentences.append(facts.looks.words)
    copies = facts.near_copies or {}  # None in plans of earlier versions
    if any(copies.values()):
        sentences.append(
            f"Near copies, which are left out: {copies['of_known_text']} of text seen before, "
            f"{copies['of_its_held_out_text']} of the batch's own held-out text."
        )
    sentences += [f"Against {name}: {drift.words}" for name, drift in facts.drift.items()]
    sentences += facts.decision.reasons
    if (stage := facts.stage) is not None:
        how = "new experts" if stage.continues is None else f"the experts of stage {stage.continues} train on"
        hours = "" if stage.hours is None else f", about {duration(3600 * stage.hours)}"
        sentences.append(
            f"Stage {stage.name} ({stage.key[:SHORT]}): {how}; {stage.tokens:,} tokens "
            f"({stage.replay_fraction:.0%} replayed), {stage.parameters_trainable / 1e6:.2f}M of "
            f"{stage.parameters_total / 1e6:.2f}M parameters train, {stage.active_flops:.1e} FLOPs, at most "
            f"{stage.disk_bytes / 1e6:,.1f} MB of disk{hours}."
        )
    if facts.power is not None:  # plans of earlier versions have none
        sentences.append(_power(facts.power))
    return [*sentences, *facts.exceeded]


def _power(power: Power) -> str:
    """The gate's power, with a warning if it would pass a harmless candidate less than half of the time."""
    passes, weakest = round(100 * power.passes), round(100 * power.weakest_passes)
    # Rounded before the comparison, so that the warning never stands beside "50 times of 100".
    found = f"This gate would pass a harmless candidate {passes} times of 100 ({power.checks} check(s) of old text)"
    if passes >= 50:
        return f"{found}."
    return (
        f"Warning: {found[0].lower()}{found[1:]}: of {power.weakest} alone {weakest}. Hold out more sources "
        f"of it, or raise evaluate.tokens or gate.tolerance."
    )


def print_plan(console: Console, facts: PlanFacts) -> None:
    """Print a plan."""
    for sentence in plan_sentences(facts):
        console.print(f"· {sentence}")


def print_outcome(console: Console, ended: TickOutcome) -> None:
    """Print how the tick ended."""
    now = ended.champion
    serves = f" Version {now.version} serves (stage {now.stage})." if now is not None else ""
    console.print(
        f"{ended.outcome}: {ended.reason}.{serves}",
    )


def tick_note(ended: TickOutcome, facts: PlanFacts, verdict: Verdict | None) -> str:
    """The note of the tick's MLflow run, as Markdown."""
    lines = [f"**{ended.outcome}**: {plain(ended.reason)}.", "", "### Plan", ""]
    lines += [f"- {plain(sentence)}" for sentence in plan_sentences(facts)]
    if verdict is not None:
        lines += ["", "### Gate", ""]
        lines += [f"- {'✓' if check.passed else '✗'} {plain(check.sentence)}" for check in verdict.checks]
        lines += [f"- {plain(sentence)}" for sentence in verdict.notes]
    return "\n".join(lines)
