"""Write the tables of README.md and docs/ from the JSON of the runs; run it after either changes.

    python docs/make_tables.py

A table stands in a page between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``TABLES`` says what makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ABSENT = "–"
Row = Mapping[str, Any]


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """A page with all its tables made anew."""
    return TABLE.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


@cache
def read(name: str) -> Any:
    """``docs/NAME.json``."""
    return json.loads((ROOT / f"docs/{name}.json").read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table: so many columns to the left, then numbers to the right."""
    columns = "|" + "---|" * left + "---:|" * (len(header) - left)
    return [f"| {' | '.join(header)} |", columns, *(f"| {' | '.join(row)} |" for row in rows)]


# What `lifelong-moe compare` writes.

COLUMNS: dict[str, tuple[str, float, str]] = {
    "forgetting_max": ("X: forgetting, worst, %", 100, "+.1f"),
    "forgetting_mean": ("mean, %", 100, "+.1f"),
    "plasticity_gap": ("Y: plasticity gap, worst, %", 100, "+.1f"),
    "oracle_gap": ("Z: oracle gap, %", 100, "+.1f"),
    "leak_max": ("leak, worst, %", 100, ".1f"),
    "final_mean_bits_per_byte": ("final bits per byte", 1, ".3f"),
    "parameters_total": ("parameters", 1e-6, ".2f"),
    "active_flops": ("active FLOPs", 1, ".3g"),
}
"""Header, scale and form of a number of an arm."""
WITHOUT_INTERVAL = ("leak_max", "parameters_total", "active_flops")


def number(arm: Row, key: str) -> str:
    """``mean ± half of the interval`` over seeds."""
    found, (_, scale, form) = arm["summary"][key], COLUMNS[key]
    if found is None:
        return ABSENT
    shown = format(scale * found["mean"], form) + (" M" if key == "parameters_total" else "")
    if found["high"] is None or key in WITHOUT_INTERVAL:
        return shown
    return f"{shown} ± {scale * (found['high'] - found['mean']):{form.removeprefix('+')}}"


def chosen(comparison: Row, names: Sequence[str] | None) -> list[Row]:
    """Arms by name, in this order; all if none are named."""
    by_name = {arm["name"]: arm for arm in comparison["arms"]}
    return [by_name[name] for name in names] if names else list(by_name.values())


def seeds(arm: Row) -> int:
    return sum(run["status"] == "committed" for run in arm["runs"])


def arms(file: str, names: Sequence[str] | None = None) -> list[str]:
    """Every number of some arms."""
    rows = [
        [f"`{arm['name']}`", str(seeds(arm)), *(number(arm, key) for key in COLUMNS)]
        for arm in chosen(read(file), names)
    ]
    return markdown(["arm", "seeds", *(header for header, _, _ in COLUMNS.values())], rows)


BENCH = [arm["name"] for arm in read("results/bench")["arms"]]
ASSIGNMENTS = ["joint", *(name for name in BENCH if name.startswith("joint_"))]
TABLES: dict[str, Callable[[], list[str]]] = {
    "bench": partial(arms, "results/bench", [name for name in BENCH if name not in ASSIGNMENTS[1:]]),
}


def main() -> None:
    """Write the pages."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text), encoding="utf-8")


if __name__ == "__main__":
    main()
