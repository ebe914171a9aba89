"""What a run or a comparison has shown, in sentences. Pure: reports in, text out.

A difference counts only if it is clear: 0.01 bits per byte at least, of one sign with two seeds, and with three or more
outside of what their spread explains (a 95 % interval without 0). Anything less is a tie, and is called so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lifelong_moe.reports.report import Report
from lifelong_moe.reports.seeds import FEW, over_seeds

CLEAR = 0.01
"""Bits per byte: what a warning of forgetting asks for, too."""
FEW_NAMES = 3
"""Distributions that a sentence names one by one."""
LEAKS = 0.05
"""Router leak from which a sentence says what to do about it."""
LOSING = ("lost", "may have lost")
"""What a distribution whose loss has risen is said to have: clearly, or within the spread over seeds."""
NAIVE = ("unrestrained", "sequential")
"""Methods without retention, which others are compared with."""
BySeed = Mapping[int, float]
FIRST_AMOUNT = re.compile(r"(\d\.\d\d) (better|worse)")
GLOSSARY: Mapping[str, str] = {
    "bits per byte": (
        "loss on held-out text over the bytes of that text, so that tokenizers compare. Lower is better; differences "
        "below 0.01 are noise."
    ),
    "forgetting": (
        "how much the held-out loss of a text has risen since the last stage that learned it; in brackets, by how many "
        "per cent perplexity per token has."
    ),
    "forward transfer": (
        "how much better than the untrained model later texts are predicted just before they are learned, in the mean."
    ),
    "plasticity gap": (
        "how much worse a stage learns its own text than a run that may forget everything (method=sequential or "
        "unrestrained)."
    ),
    "generation": (
        "what one stage adds to the model: experts, router rows, low-rank changes. Older generations stay as they are."
    ),
    "generations a token": (
        "how many generations read a token, in the mean over texts and of the text with the most: what reading costs "
        "beside a model of one generation."
    ),
    "unused expert": (
        "one that next to no token of any text reaches, as after a short training. It costs parameters and no time; a "
        "balance loss (routing.balance_loss) spreads tokens more evenly."
    ),
    "router leak": (
        "share of an old text's tokens that go to experts born after it was learned. It harms only if that text lost, "
        "too. Then keep generations apart (routing.bundles=cluster trunk.train=deltas), let the router review "
        "old text (review.fraction), or replay more (replay.fraction)."
    ),
}
"""The words of a verdict and of the table above it."""


@dataclass(frozen=True)
class Outcome:
    """What a run has reached, or an arm of a comparison with each of its seeds; losses in bits per byte."""

    name: str
    forgetting: Mapping[str, BySeed]
    """Of each old distribution."""
    learned: Mapping[str, BySeed]
    """Loss right after learning, of what was learned from the second stage on."""
    final: Mapping[str, BySeed]
    """Loss after the last stage, of each distribution."""
    flops: float
    """Mean over seeds."""
    leaks: Mapping[str, float]
    """Router leak of each distribution that can have one, mean over seeds."""
    by_training: Mapping[str, BySeed] = field(default_factory=dict)
    """Of what was learned from the second stage on, the change of its loss by that stage."""


def outcome_of_report(report: Report) -> Outcome:
    """The outcome of a run."""

    def by_seed(values: Mapping[str, float]) -> dict[str, BySeed]:
        return {name: {report.seed: value} for name, value in values.items()}

    final = dict(zip(report.distributions, report.bits_per_byte[-1], strict=True))
    return Outcome(
        name=report.run,
        forgetting=by_seed(report.forgetting_bits_per_byte),
        learned=by_seed(report.learned()),
        final=by_seed(final),
        flops=sum(stage.active_flops for stage in report.stages),
        leaks=report.leaks(),
        by_training=by_seed(report.changed_by_training()),
    )


def outcome_of_arm(arm: Mapping[str, Any]) -> Outcome | None:
    """The outcome of an arm in ``comparison.json``; None before one of its runs is committed."""
    runs = {run["seed"]: run for run in arm["runs"] if run["status"] == "committed"}
    if not runs:
        return None
    leaks = _by_distribution({seed: run["leak"] for seed, run in runs.items()})
    curves = {seed: run["curves"] for seed, run in runs.items()}
    # Of the first stage's text alone: nothing was there before.
    later = {name: i for name, i in arm["learned_after"].items() if i > 0}
    learned = {seed: {n: of[n][i] for n, i in later.items() if n in of} for seed, of in curves.items()}
    changed = {seed: {n: of[n][i] - of[n][i - 1] for n, i in later.items() if n in of} for seed, of in curves.items()}
    return Outcome(
        name=arm["name"],
        forgetting=_by_distribution({seed: run["forgetting_bits_per_byte"] for seed, run in runs.items()}),
        learned=_by_distribution(learned),
        final=_by_distribution({seed: run["final_bits_per_byte"] for seed, run in runs.items()}),
        flops=fmean(run["numbers"]["active_flops"] for run in runs.values()),
        leaks={name: fmean(values.values()) for name, values in leaks.items()},
        by_training=_by_distribution(changed),
    )


def report_verdict(reports: Sequence[Report]) -> list[str]:
    """Sentences on runs side by side: each against the first one without retention, or else the last one."""
    outcomes = [outcome_of_report(one) for one in reports]
    naive = (found for one, found in zip(reports, outcomes, strict=True) if one.method in NAIVE)
    reference = next(naive, outcomes[-1])
    others = [one for one in outcomes if one is not reference]
    return [sentence for one in others for sentence in verdict(one, reference)] or verdict(reference)


def comparison_verdict(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sentences on each arm that has results, by its name: against the reference, and on the reference by itself."""
    outcomes = {arm["name"]: found for arm in comparison["arms"] if (found := outcome_of_arm(arm)) is not None}
    reference = outcomes.get(comparison["reference"])
    return {name: verdict(one, None if one is reference else reference) for name, one in outcomes.items()}


def verdict(one: Outcome, reference: Outcome | None = None) -> list[str]:
    """A sentence on what was kept, learned and paid, and ones on training that did harm and on a leak worth a word.

    Args:
        one: What is judged.
        reference: What it is compared with; without it the sentence says what it reached by itself.
    """
    # Measured on other text, it is no reference.
    beside = reference if reference is not None and set(one.final) & set(reference.final) else None
    parts = [_kept(one, beside), _learned(one, beside)]
    if beside is not None:
        parts += [_in_the_mean(one, beside), _cost(one.flops, beside.flops)]
    said = "; ".join(filter(None, parts))
    if "bits per byte" not in said:  # where nothing was kept or lost
        said = FIRST_AMOUNT.sub(r"\1 bits per byte \2", said, count=1)
    return [f"{one.name} {said}.", *_made_worse(one), *_leak(one)]


def _by_distribution(runs: Mapping[int, Mapping[str, float]]) -> dict[str, BySeed]:
    """Values of each seed's distributions, by distribution."""
    names = dict.fromkeys(name for values in runs.values() for name in values)
    return {name: {seed: values[name] for seed, values in runs.items() if name in values} for name in names}


def _kept(one: Outcome, reference: Outcome | None) -> str:
    """What became of old distributions, and what the reference made of the same ones."""
    if not one.forgetting:
        return "could forget nothing: its last stage trained on all that it learned"
    clauses = []
    for verb, values in _by_verb(one.forgetting).items():
        clause = _phrase(verb, values)
        theirs = {} if reference is None else {n: reference.forgetting[n] for n in values if n in reference.forgetting}
        if reference is not None and theirs:
            clause += f" where {reference.name} {_same(verb, theirs)}"
        clauses.append(clause)
    return ", and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def _by_verb(forgetting: Mapping[str, BySeed]) -> dict[str, dict[str, BySeed]]:
    """Distributions by what became of them, the worst news first; within, the largest loss first."""
    found: dict[str, dict[str, BySeed]] = {verb: {} for verb in (*LOSING, "kept", "improved")}
    for name, values in sorted(forgetting.items(), key=lambda item: -_mean(item[1])):
        mean, values_of = _mean(values), list(values.values())
        clear = is_clear(values_of)
        verb = ("lost" if mean > 0 else "improved") if clear else "may have lost" if mean >= CLEAR else "kept"
        found[verb][name] = values
    return {verb: values for verb, values in found.items() if values}


def _phrase(verb: str, values: Mapping[str, BySeed]) -> str:
    """Such as ``lost 0.71 bits per byte of code and 0.17 of docs``."""
    means = {name: _mean(one) for name, one in values.items()}
    if len(means) > FEW_NAMES:
        worst, level, many = max(means.values()), fmean(means.values()), f"{len(means)} distributions"
        if verb in LOSING:
            return f"{verb} {worst:.2f} bits per byte at worst and {level:.2f} in the mean of {many}"
        return f"{verb} {many} ({_signed(worst)} bits per byte at worst, {_signed(level)} in the mean)"
    parts = []
    for place, (name, mean) in enumerate(means.items()):
        amount = _with_unit(_signed(mean) if verb == "kept" else f"{abs(mean):.2f}", place)
        forms = {"kept": f"{name} ({amount})", "improved": f"{name} by {amount}"}
        parts.append(forms.get(verb, f"{amount} of {name}"))
    return f"{verb} {listed(parts)}"


def _same(verb: str, theirs: Mapping[str, BySeed]) -> str:
    """What the reference made of distributions that were just named."""
    groups = _by_verb(theirs)
    (found, *others), they = groups, "it" if len(theirs) == 1 else "them"
    if others or len(theirs) > FEW_NAMES:
        return " and ".join(_phrase(other, values) for other, values in groups.items())
    if found == "kept":
        return f"kept {they}{' too' if verb == 'kept' else ''}"
    # All of one kind: in the order in which they were named, so the amounts say enough.
    amounts = f"{listed(f'{abs(_mean(values)):.2f}' for values in theirs.values())} bits per byte"
    return f"improved {they} by {amounts}" if found == "improved" else f"{found} {amounts}"


def _learned(one: Outcome, reference: Outcome | None) -> str:
    """How well new distributions were learned, right after their stages."""
    if reference is None:
        means = {name: _mean(values) for name, values in one.learned.items()}
        if not means:
            return ""
        if len(means) > FEW_NAMES:
            return f"it learned {len(means)} distributions to {fmean(means.values()):.2f} bits per byte in the mean"
        return "it learned " + listed(f"{n} to {_with_unit(f'{v:.2f}', i)}" for i, (n, v) in enumerate(means.items()))
    behind = {
        name: gaps(one.learned[name], reference.learned[name]) for name in one.learned if name in reference.learned
    }
    if not behind:
        return ""
    if len(behind) > FEW_NAMES:
        means = {name: fmean(gap) for name, gap in behind.items()}
        worst = max(means, key=lambda name: means[name])
        level = _better(mean := fmean(means.values()), abs(mean) >= CLEAR)
        return (
            f"it learned {len(behind)} distributions {level} in the mean ({_signed(means[worst])} at worst, of {worst})"
        )
    return "it learned " + listed(f"{name} {_better(fmean(gap), is_clear(gap))}" for name, gap in behind.items())


def _in_the_mean(one: Outcome, reference: Outcome) -> str:
    """How far apart the two end; a mean over other distributions would be another quantity."""
    if set(one.final) != set(reference.final):
        return ""
    gap = gaps(mean_loss(one), mean_loss(reference))
    return f"in the mean it ends {_better(fmean(gap), is_clear(gap), tie='level')}"


def _cost(ours: float, theirs: float) -> str:
    if not theirs:  # of a report that counted none
        return ""
    percent = 100 * (ours / theirs - 1)
    if abs(percent) < 0.5:
        return "as many FLOPs"
    return f"{abs(percent):.0f} % {'more' if percent > 0 else 'fewer'} FLOPs"


def _made_worse(one: Outcome) -> list[str]:
    """Text that its own stage has made worse: few documents read many times, or too high a rate."""
    worse = {name: _mean(found) for name, found in one.by_training.items() if is_clear([*found.values()])}
    worse = {name: rise for name, rise in worse.items() if rise > 0}
    if not worse:
        return []
    rises = listed(f"{name} {_with_unit(f'{rise:.2f}', i)}" for i, (name, rise) in enumerate(worse.items()))
    return [
        f"Training on it has made held-out text worse than it was before, {rises}: give such a stage more text, fewer "
        f"tokens (plan shows the epochs) or a lower optim.lr."
    ]


def _leak(one: Outcome) -> list[str]:
    """A leak never stands without what it means and what to do."""
    leaking = [name for name, leak in one.leaks.items() if leak >= LEAKS]
    # One that has lost something comes before one that leaks more and has kept all.
    lost = {name for verb, values in _by_verb(one.forgetting).items() if verb in LOSING for name in values}
    harmed = [name for name in leaking if name in lost]
    if not leaking:
        return []
    name = max(harmed or leaking, key=lambda name: one.leaks[name])
    found = f"{one.leaks[name]:.0%} of {name} goes to experts that were born later (router leak)"
    if not harmed:
        return [f"{found}, which cost it nothing: nothing to do."]
    lost_by = "and it lost by that" if is_clear([*one.forgetting[name].values()]) else "and if it lost, then by that"
    return [
        f"{found}, {lost_by} or by a trunk that moved: keep generations apart (routing.bundles=cluster "
        f"trunk.train=deltas), let the router review old text (review.fraction), or replay more (replay.fraction)."
    ]


def mean_loss(one: Outcome) -> BySeed:
    """Mean over distributions of the loss after the last stage, by seed."""
    return {seed: fmean(values[seed] for values in one.final.values()) for seed in next(iter(one.final.values()))}


def gaps(ours: BySeed, theirs: BySeed) -> list[float]:
    """Differences with the same seeds; that of the means if there are none."""
    common = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return common or [_mean(ours) - _mean(theirs)]


def is_clear(values: Sequence[float]) -> bool:
    """Whether a difference is more than noise: see the module."""
    found = over_seeds(values)
    if found is None or abs(found.mean) < CLEAR:
        return False
    if found.n <= FEW:
        return found.lowest * found.highest > 0
    return found.low is not None and found.high is not None and found.low * found.high > 0


def _better(gap: float, is_clear: bool, tie: str = "as well") -> str:
    if not is_clear:
        return tie
    return f"{abs(gap):.2f} {'worse' if gap > 0 else 'better'}"


def _mean(values: BySeed) -> float:
    return fmean(values.values())


def _signed(value: float) -> str:
    # No minus before what is shown as 0.
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def _with_unit(amount: str, place: int) -> str:
    """The first amount of a list has the unit."""
    return amount + (" bits per byte" if place == 0 else "")


def listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
