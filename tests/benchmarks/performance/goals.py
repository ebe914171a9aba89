"""A figure beside its goal, and the table of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PARTS: dict[str, tuple[str, ...]] = {
    "step": ("P1", "P1b", "P5"),
    "layer": ("P2",),
    "lifelong": ("P3", "P4", "P7"),
    "growth_curves": (),
    "profile": (),
    "overhead": ("P6",),
    "growth": ("P8",),
    "text": ("P9",),
    "clustering": ("P10",),
    "startup": ("P11",),
    "inference": ("P12",),
    "attention_by_document": (),
    "years": ("P17", "P18"),
}
"""Every part, in the order in which they run, and the goals that it answers; one may be answered by several figures,
named "P6 data" and so on."""
NOT_MEASURED = "not measured"
_GOAL = re.compile(r"\s*(<=|>=|≤|≥)\s*([0-9.eE+-]+)")

Row = tuple[str, str, str, str, str]


def bound(goal: str) -> tuple[bool, float]:
    """Whether a goal such as ``<= 2`` is a most, and the number.

    Raises:
        ValueError: If it is written otherwise.
    """
    found = _GOAL.match(goal)
    if found is None:
        raise ValueError(f"a goal is written '<= 2' or '>= 0.9', not {goal!r}")
    return found[1] in ("<=", "≤"), float(found[2])


def judged(value: float, low: float, high: float, goal: str, unit: str) -> dict[str, Any]:
    """A figure with its spread, its goal and whether it is met."""
    at_most, limit = bound(goal)
    met = value <= limit if at_most else value >= limit
    figures = {name: float(f"{number:.4g}") for name, number in (("value", value), ("low", low), ("high", high))}
    return {**figures, "goal": goal, "met": bool(met), "unit": unit}


def rows(parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows (what, measured, spread, goal, met) of the parts that ran, one that failed included.

    Args:
        parts: By name what each measured, or ``{"not_measured": reason}``.
    """
    found: list[Row] = []
    for name in sorted(parts, key=_place):
        part, expected = parts[name], PARTS.get(name, ())
        goals = part.get("goals", {})
        found += [_row(f"{what} ({name})", goal) for what, goal in goals.items()]
        reason = part.get("not_measured")
        if reason is None and not expected and not goals:
            found.append((name, "curves only", "", "", ""))
        absent = [g for g in expected if not any(what.split()[0] == g for what in goals)]
        if reason is not None and not expected:
            found.append((name, f"{NOT_MEASURED}: {reason}", "", "", ""))
        for goal in absent:
            why = "the part does not report it" if reason is None else reason
            found.append((f"{goal} ({name})", f"{NOT_MEASURED}: {why}", "", "", ""))
    return found


def page(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, and what each part ran on."""
    lines = ["| what | measured | spread (quartiles) | goal | met |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(parts) if row[1] != "curves only"]
    origins = {}
    for name in sorted(parts, key=_place):
        run = parts[name]["run"]
        machine = f"{run['gpu'] + ', ' if run['gpu'] else ''}{run['cpu']}, {run['cores']} cores, torch {run['torch']}"
        changed = " with changes" if run["dirty"] else ""
        origin = f"commit `{str(run['commit'])[:12]}`{changed}, {run['date'][:10]}, {machine}, `{run['command']}`"
        origins.setdefault(origin, []).append(name)
    lines += ["", *(f"{', '.join(names)}: {origin}." for origin, names in origins.items())]
    return "\n".join(lines) + "\n"


def _place(name: str) -> int:
    return list(PARTS).index(name) if name in PARTS else len(PARTS)


def _row(what: str, goal: Mapping[str, Any]) -> Row:
    unit = f" {goal['unit']}" if goal.get("unit") else ""
    spread = f"{goal['low']:.4g} – {goal['high']:.4g}" if "low" in goal and "high" in goal else ""
    return what, f"{goal['value']:.4g}{unit}", spread, f"{goal['goal']}{unit}", "yes" if goal["met"] else "NO"
