"""Tables of a comparison, for the terminal and, as Markdown, for MLflow and ``comparison.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.errors import both_ends
from lifelong_moe.measures import MEASURES, Measure
from lifelong_moe.reports.ranking import Ranked, best, ranking
from lifelong_moe.reports.seeds import FEW
from lifelong_moe.reports.verdict import comparison_verdict
from pipelines.compare.numbers import is_by_definition
from pipelines.run.render import millions, tell
from pipelines.shared.markdown import plain, table_row
from pipelines.shared.tables import show

Arm = Mapping[str, Any]
RULE, LEAST_NAME = 6, 16
"""Columns of a terminal: of what else is on a run's heading, and of the run's name at least."""
ABSENT = "–"
COLUMNS = {
    "forgetting_max_bits_per_byte": "forgetting_max",
    "forgetting_mean_bits_per_byte": "forgetting_mean",
    "plasticity_gap_bits_per_byte": "plasticity_gap",
    "oracle_gap_bits_per_byte": "oracle_gap",
    "final_mean_bits_per_byte": None,
    "leak_max": None,
}
"""Each number of the first table, and the one that stands beside it in brackets, in %."""
COMPARED = (
    "forgetting_max_bits_per_byte",
    "plasticity_gap_bits_per_byte",
    "oracle_gap_bits_per_byte",
    "final_mean_bits_per_byte",
)
"""Numbers whose differences from the reference are shown."""
EXPLANATION = (
    "Forgetting compares with the loss right after learning, the plasticity gap with an unrestrained run of the same "
    "seed, the oracle gap with a joint run; positive is worse. In brackets: the same as a rise of perplexity. Tokens "
    "and FLOPs are those of an arm's stages; models trained from scratch are counted apart. Means over seeds ± 95 % "
    "t-interval; of two seeds both values, of one its own. – is unknown, or 0 by definition. Arms are ranked by the "
    "held-out mean; one that is not clearly worse than the first is within the noise of it."
)


@dataclass(frozen=True)
class Grid:
    """A table: names in its first column, numbers in the others."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(comparison: Mapping[str, Any]) -> list[Grid]:
    """The tables of a comparison: results, differences, cost, and numbers per distribution."""
    arms = comparison["arms"]
    names, reference = comparison["distributions"], comparison["reference"]
    # The reference has no differences, nor has an arm without two seeds in common with it.
    compared = [arm for arm in arms if arm["differences"] and any(arm["differences"].values())]
    ranked = {one.name: one for one in ranking(comparison)}
    # Python's sort keeps the order of those without a place, which come last.
    by_place = sorted(arms, key=lambda arm: ranked[arm["name"]].place if arm["name"] in ranked else len(arms) + 1)
    found = [
        Grid(
            "Results",
            ("arm", "rank", "seeds", *(MEASURES[key].title for key in COLUMNS)),
            [_results(arm, comparison, ranked.get(arm["name"])) for arm in by_place],
        ),
        Grid(
            "Cost",
            ("arm", "method", "tokens", "active FLOPs", "parameters", "active", "epochs, most", "seconds"),
            [_cost(arm) for arm in arms],
        ),
        Grid(
            "Held-out loss at the end (bits/byte)",
            ("arm", *names),
            [_by_name(arm, "final_bits_per_byte", names, "{:.3f}") for arm in arms],
        ),
    ]
    # Inserted before the table of differences, which comes in front of it and would shift its place.
    if with_scratch := [arm for arm in arms if (arm["summary"].get("scratch_tokens") or {"mean": 0})["mean"]]:
        header = ("arm", "tokens", "active FLOPs")
        found.insert(
            2,
            Grid(
                "Cost of models trained from scratch, apart from the arm's stages",
                header,
                [*map(_scratch_cost, with_scratch)],
            ),
        )
    if compared:
        title = f"Differences from {reference} with the same seeds"
        if any(found["n"] > FEW for arm in compared for found in arm["differences"].values() if found):
            title += " (p of the paired t-test, not corrected)"
        titles = ("arm", *(MEASURES[key].title for key in COMPARED))
        found.insert(1, Grid(title, titles, [_difference(arm, comparison) for arm in compared]))
    if any("leak_max" in arm["summary"] and arm["summary"]["leak_max"] for arm in arms):
        found.append(
            Grid("Router leak (%)", ("arm", *names), [_by_name(arm, "leak", names, "{:.1f}", 100) for arm in arms])
        )
    return found


def heading(console: Console, run: str, how: str) -> None:
    """Print a line on which a run begins."""
    # rich would cut the end, where seeds and the arms of a grid differ.
    name = both_ends(run, max(LEAST_NAME, console.width - len(how) - RULE))
    console.rule(f"{name}: {how}", align="left", style="dim")


def terminal(console: Console, comparison: Mapping[str, Any]) -> None:
    """Print the tables."""
    for grid in grids(comparison):
        table = Table(title=grid.title, title_justify="left")
        # Columns without a number take the room that others need; `absent` says what is missing.
        shown = [i for i in range(len(grid.header)) if any(row[i] != ABSENT for row in grid.rows)]
        for i in shown:
            table.add_column(grid.header[i], justify="right" if i else "left")
        for row in grid.rows:
            # A cell is folded at its spaces, and a number stays beside its unit.
            table.add_row(*(row[i].replace(" %)", "%)") for i in shown))
        show(console, table)
    console.print(EXPLANATION)
    for line in absent(comparison):
        console.print(line, style="yellow")
    tell(console, sentences(comparison))


def sentences(comparison: Mapping[str, Any]) -> list[str]:
    """What was shown in words: of each arm against the reference, or of the reference if there is no other."""
    found = comparison_verdict(comparison)
    others = [said for name, said in found.items() if name != comparison["reference"]]
    # By itself, what is said of a leak would not tell whose it is.
    return [*best(ranking(comparison)), *(" ".join(said) for said in others or found.values())]


def markdown(comparison: Mapping[str, Any]) -> str:
    """The tables for ``comparison.md`` and the comparison's page in MLflow."""
    lines = [
        *(f"- {plain(sentence)}" for sentence in sentences(comparison)),
        "",
        f"**{plain(comparison['compare'])}** · base {plain(comparison['base'])} · equal {comparison['budget']} · "
        f"seeds {', '.join(map(str, comparison['seeds']))} · reference {plain(comparison['reference'])}",
        "",
        EXPLANATION,
    ]
    for grid in grids(comparison):
        lines += [
            "",
            f"### {plain(grid.title)}",
            "",
            table_row(grid.header),
            "|---|" + "---:|" * (len(grid.header) - 1),
        ]
        lines += map(table_row, grid.rows)
    if missing := absent(comparison):
        lines += ["", "### Missing", "", *(f"- {plain(line)}" for line in missing)]
    return "\n".join(lines) + "\n"


def absent(comparison: Mapping[str, Any]) -> list[str]:
    """One line for each run without a result, and for each reference arm that does not exist."""
    lines = [
        f"{run['run']}: {run['reason'] or 'not committed yet'}"
        for arm in comparison["arms"]
        for run in arm["runs"]
        if run["status"] != "committed"
    ]
    measured = {arm["name"]: set(run["final_bits_per_byte"]) for arm in comparison["arms"] for run in arm["runs"]
                if run["status"] == "committed"}  # fmt: skip
    for name, found in measured.items():
        # As long as the reference has no result, there is nothing to differ from.
        if found != measured.get(comparison["reference"], found):
            lines.append(
                f"{name} was measured on other distributions than {comparison['reference']}, so their means are not "
                f"compared"
            )
    for role, gap in (("unrestrained", "plasticity"), ("joint", "oracle")):
        if comparison[role] is None:
            lines.append(f"no {role} arm, so no {gap} gap")
    return lines


def _results(arm: Arm, comparison: Mapping[str, Any], ranked: Ranked | None) -> list[str]:
    done = sum(run["status"] == "committed" for run in arm["runs"])
    place = ABSENT if ranked is None else str(ranked.place)
    if ranked is not None and ranked.is_tied and ranked.place > 1:
        place += ", within noise"
    cells = [arm["name"], place, f"{done}/{len(arm['runs'])}"]
    for key, beside in COLUMNS.items():
        found = None if is_by_definition(key, comparison, arm["name"]) else arm["summary"].get(key)
        cell = _value(found, MEASURES[key])
        if found and beside and (rise := arm["summary"].get(beside)):
            cell += f" ({MEASURES[beside].show(rise['mean'])} %)"
        cells.append(cell)
    return cells


def _cost(arm: Arm) -> list[str]:
    mean = {key: value["mean"] for key, value in arm["summary"].items() if value is not None}
    if not mean:
        return [arm["name"], arm["method"], *[ABSENT] * 6]
    return [
        arm["name"],
        arm["method"],
        f"{mean['tokens']:,.0f}",
        f"{mean['active_flops']:.3e}",
        *(millions(mean[f"parameters_{kind}"]) for kind in ("total", "active")),
        f"{mean['epochs_max']:.2f}",
        f"{mean['seconds']:.0f}",
    ]


def _scratch_cost(arm: Arm) -> list[str]:
    forms = {"tokens": "{:,.0f}", "active_flops": "{:.3e}"}
    means = {key: arm["summary"].get(f"scratch_{key}") for key in forms}
    return [arm["name"], *(forms[key].format(found["mean"]) if found else ABSENT for key, found in means.items())]


def _difference(arm: Arm, comparison: Mapping[str, Any]) -> list[str]:
    cells = [arm["name"]]
    # A difference shows its sign: positive is worse than the reference for each of these numbers.
    for key in COMPARED:
        found = None if is_by_definition(key, comparison, arm["name"]) else arm["differences"].get(key)
        cell = _value(found, replace(MEASURES[key], signed=True))
        cells.append(f"{cell}, p {_p(found['p'])}" if found and found["n"] > FEW else cell)
    return cells


def _p(value: float | None) -> str:
    # Three digits: a t-test over a few seeds supports no more.
    return ABSENT if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _by_name(arm: Arm, field: str, names: Sequence[str], form: str, scale: float = 1.0) -> list[str]:
    """A mean over seeds for each distribution."""
    cells = [arm["name"]]
    for name in names:
        found = [run[field][name] for run in arm["runs"] if name in run.get(field, {})]
        cells.append(form.format(scale * sum(found) / len(found)) if found else ABSENT)
    return cells


def _value(found: Mapping[str, Any] | None, measure: Measure) -> str:
    """``mean ± half of the interval``; of two seeds both values, which say more than an interval over two."""
    if found is None:
        return ABSENT
    if found["n"] == FEW:
        return f"{measure.show(found['lowest'])} … {measure.show(found['highest'])}"
    shown = measure.show(found["mean"])
    # The half width with as many digits as the mean.
    return (
        shown
        if found["high"] is None
        else f"{shown} ± {replace(measure, signed=False).show(found['high'] - found['mean'])}"
    )
