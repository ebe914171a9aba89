"""Tables from JSON, and of comparisons (``lifelong-moe compare``); ``make_tables.py`` says which goes where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from lifelong_moe.reports.seeds import FEW, over_seeds

ROOT = Path(__file__).resolve().parents[1]
ABSENT = "–"
Row = Mapping[str, Any]


@cache
def read(name: str) -> Any:
    """``docs/NAME.json``."""
    return json.loads((ROOT / f"docs/{name}.json").read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> list[str]:
    """Lines of a table; ``align`` has an ``l`` or ``r`` for each column, and ``r`` is the default."""
    align = align.ljust(len(header), "r")
    columns = "|" + "".join("---|" if one == "l" else "---:|" for one in align)
    return [f"| {' | '.join(header)} |", columns, *(f"| {' | '.join(row)} |" for row in rows)]


def listed(rows: Iterable[Row], columns: Mapping[str, tuple[str, str]], align: str = "l") -> list[str]:
    """One line per row; ``columns`` maps each key to the header and the format of its column."""
    cells = (["" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items()] for row in rows)
    return markdown([header for header, _ in columns.values()], cells, align)


def percent(value: float) -> str:
    """A percentage, below 10 with one decimal."""
    return f"{100 * value:.1f}" if value < 0.1 else f"{100 * value:.0f}"


NUMBERS: dict[str, tuple[str, float, str]] = {
    "forgetting_max": ("X: forgetting, worst, %", 100, "+.1f"),
    "forgetting_mean": ("mean, %", 100, "+.1f"),
    "plasticity_gap": ("Y: plasticity gap, worst, %", 100, "+.1f"),
    "oracle_gap": ("Z: oracle gap, %", 100, "+.1f"),
    "leak_max": ("leak, worst, %", 100, ".1f"),
    "final_mean_bits_per_byte": ("final bits per byte", 1, ".3f"),
    "parameters_total": ("parameters", 1e-6, ".2f"),
    "active_flops": ("active FLOPs", 1, ".3g"),
}
"""Header, scale and format of each number of an arm."""
WITHOUT_INTERVAL = ("leak_max", "parameters_total", "active_flops")


def number(arm: Row, key: str) -> str:
    """``mean ± half of the interval`` over seeds; of two seeds both values, as an interval over two says little."""
    found, (_, scale, form) = arm["summary"][key], NUMBERS[key]
    if found is None:
        return ABSENT
    shown = format(scale * found["mean"], form) + (" M" if key == "parameters_total" else "")
    if found["high"] is None or key in WITHOUT_INTERVAL:
        return shown
    if found["n"] == FEW:
        both = sorted(run["numbers"][key] for run in arm["runs"] if (run.get("numbers") or {}).get(key) is not None)
        return " … ".join(format(scale * value, form) for value in both)
    return f"{shown} ± {scale * (found['high'] - found['mean']):{form.removeprefix('+')}}"


def chosen(file: str, names: Iterable[str] | None) -> list[Row]:
    """Arms of a comparison in this order; all if none are named."""
    by_name = {arm["name"]: arm for arm in read(file)["arms"]}
    return [by_name[name] for name in names] if names else list(by_name.values())


def seeds(arm: Row) -> int:
    """How many runs of an arm are committed."""
    return sum(run["status"] == "committed" for run in arm["runs"])


def arms(file: str, names: Iterable[str] | None = None) -> list[str]:
    """Every number of some arms."""
    rows = [
        [f"`{arm['name']}`", str(seeds(arm)), *(number(arm, key) for key in NUMBERS)] for arm in chosen(file, names)
    ]
    return markdown(["arm", "seeds", *(header for header, _, _ in NUMBERS.values())], rows)


def main_comparison(file: str, labels: Mapping[str, tuple[str, str]]) -> list[str]:
    """Some arms of a comparison under descriptive names, with the old text that each stores."""
    keys = ("final_mean_bits_per_byte", "parameters_total", "active_flops")
    [free] = chosen(file, [read(file)["unrestrained"]])
    rows = []
    for arm in chosen(file, labels):
        (label, stored), cells, num = labels[arm["name"]], [number(arm, key) for key in keys], seeds(arm)
        lost = _in_bits(arm, "forgetting_max", forgotten(arm))
        gap = ABSENT if arm is free else _in_bits(arm, "plasticity_gap", behind(arm, free))
        rows.append([f"{label} ({num} seed{'s' * (num > 1)})", lost, gap, cells[0], stored, *cells[1:]])
    header = [
        "",
        *(f"{name}, worst, bits per byte" for name in ("forgetting", "plasticity gap")),
        "final mean, bits per byte",
    ]
    return markdown([*header, "stored old text", "parameters", "active FLOPs"], rows, "lrrrl")


def forgotten(arm: Row) -> list[float]:
    """Bits per byte that the worst old distribution has lost at the end, by seed."""
    after, last = arm["learned_after"], len(arm["stages"]) - 1
    return [max(of[n][-1] - of[n][i] for n, i in after.items() if i < last) for of in _curves(arm).values()]


def behind(arm: Row, free: Row) -> list[float]:
    """Bits per byte by which the worst new distribution is learned less well than by the arm that may forget."""
    theirs, new = _curves(free), {name: i for name, i in arm["learned_after"].items() if i > 0}
    return [max(of[n][i] - theirs[seed][n][free["learned_after"][n]] for n, i in new.items())
            for seed, of in _curves(arm).items()]  # fmt: skip


def _curves(arm: Row) -> dict[int, Mapping[str, Sequence[float]]]:
    return {run["seed"]: run["curves"] for run in arm["runs"] if run["status"] == "committed"}


def _in_bits(arm: Row, key: str, values: Sequence[float]) -> str:
    """Bits per byte over seeds, of two seeds both values, and in brackets the mean rise of perplexity."""
    shown = [f"{value:+.2f}" if abs(value) >= 0.005 else "0.00" for value in (fmean(values), min(values), max(values))]
    spread = f"{shown[1]} … {shown[2]}" if len(values) == FEW else shown[0]
    if len(values) > FEW:
        found = over_seeds(values)
        spread += f" ± {found.high - found.mean:.2f}" if found is not None and found.high is not None else ""
    return f"{spread} ({100 * arm['summary'][key]['mean']:+.1f} %)"


def differences(file: str, names: Sequence[str]) -> list[str]:
    """Differences to the reference in the final mean, paired by seed."""
    rows = []
    for arm in chosen(file, names):
        found = arm["differences"]["final_mean_nats"]
        interval = f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
        rows.append([f"`{arm['name']}`", str(found["n"]), interval, f"{found['p']:.2g}"])
    return markdown(["arm", "seeds", "mean [95 % interval]", "p"], rows)


def learned_and_kept(file: str, names: Iterable[str]) -> list[str]:
    """Bits per byte of each distribution right after its stage and at the end, means over seeds."""
    rows, distributions = [], list(read(file)["distributions"])
    for arm in chosen(file, names):
        runs = [run["curves"] for run in arm["runs"] if run["status"] == "committed"]
        cells = []
        for name in distributions:
            after = arm["learned_after"][name]
            own, last = (sum(run[name][i] for run in runs) / len(runs) for i in (after, -1))
            cells.append(f"{own:.3f}" if after == len(arm["stages"]) - 1 else f"{own:.3f} → {last:.3f}")
        rows.append([f"`{arm['name']}`", str(len(runs)), *cells])
    return markdown(["arm", "seeds", *distributions], rows)


def curves(file: str, name: str) -> list[str]:
    """An arm's losses after each stage, with its first seed."""
    [arm] = chosen(file, [name])
    found = arm["runs"][0]["curves"]
    rows = [[stage, *(f"{curve[i]:.3f}" for curve in found.values())] for i, stage in enumerate(arm["stages"])]
    return markdown(["after", *found], rows)


def before_and_after(before: str, after: str, names: Iterable[str]) -> list[str]:
    """Some numbers of each arm's first seed in two comparisons."""
    keys = ("forgetting_max", "plasticity_gap", "oracle_gap", "final_mean_bits_per_byte")
    rows = []
    for pair in zip(chosen(before, names), chosen(after, names), strict=True):
        row = [f"`{pair[0]['name']}`"]
        for key in keys:
            values, (_, scale, form) = [arm["runs"][0]["numbers"][key] for arm in pair], NUMBERS[key]
            row.append(" → ".join(ABSENT if v is None else format(scale * v, form) for v in values))
        rows.append(row)
    return markdown(["arm", *(NUMBERS[key][0] for key in keys)], rows)


def systems(labels: Mapping[str, str]) -> list[str]:
    """Routers, best first; a star marks losses summed over layers."""
    found = [(arm["name"], " *", arm["runs"][0]["numbers"]) for arm in read("results/systems")["arms"]]
    found += [(arm["name"], "", arm) for arm in read("results/systems_earlier")["arms"]]
    forms = {
        "final_mean_bits_per_byte": ("final, bits per byte", 1, ".3f"),
        "forgetting_max": ("forgetting, worst, %", 100, "+.1f"),
        "forgetting_mean": ("mean, %", 100, "+.1f"),
        "leak_max": ("leak, worst, %", 100, ".0f"),
        "active_flops": ("active FLOPs", 1, ".3g"),
        "seconds": ("seconds", 1, ".0f"),
    }
    rows = [
        [f"`{name}`", labels[name] + star, *(format(scale * n[key], form) for key, (_, scale, form) in forms.items())]
        for name, star, n in sorted(found, key=lambda one: one[2]["final_mean_bits_per_byte"])
    ]
    return markdown(["arm", "routing", *(header for header, _, _ in forms.values())], rows, "ll")
