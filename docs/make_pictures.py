"""Draw the pictures of README.md and docs/results.md from the JSON of the comparisons that they show.

PYTHONPATH=$PWD python docs/make_pictures.py
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import table_kinds as kinds
from make_tables import MAIN

from lifelong_moe.reports.figures.comparison import FORGETTING, GAP, pareto_figure
from lifelong_moe.storage.keys import content_key


def in_bits(file: str, names: Mapping[str, str]) -> dict[str, object]:
    """Some arms of a comparison under other names, with the numbers in bits per byte that earlier versions lack."""
    whole = kinds.read(file)
    [free] = kinds.chosen(file, [whole["unrestrained"]])
    arms = []
    for arm in kinds.chosen(file, names):
        # What learned all in one stage could forget nothing, and is no point of the picture.
        if len(arm["stages"]) == 1:
            continue
        numbers = {FORGETTING: kinds.forgotten(arm), GAP: kinds.behind(arm, free)}
        committed = [run for run in arm["runs"] if run["status"] == "committed"]
        runs: list[dict[str, Any]] = [
            {**run, "numbers": {**run["numbers"], **{key: values[i] for key, values in numbers.items()}}}
            for i, run in enumerate(committed)
        ]
        means = {key: {"mean": fmean(values)} for key, values in numbers.items()}
        arms.append({**arm, "name": names[arm["name"]], "runs": runs, "summary": {**arm["summary"], **means}})
    return {**whole, "arms": arms}


def pictures() -> dict[str, dict[str, object]]:
    """What each picture shows, by its path below ``docs/``."""
    readme = {name: words.replace("**", "").replace("`", "") for name, (words, _) in MAIN.items()}
    bench = {arm["name"]: arm["name"] for arm in kinds.read("results/bench")["arms"]}
    return {
        "results/trained_base.png": in_bits("results/trained_base", readme),
        "results/pareto.png": in_bits("results/bench", bench),
    }


def main() -> None:
    """Draw each picture beside its JSON; it keeps the key of what it shows, by which a test knows whether it is old."""
    for path, shown in pictures().items():
        figure = pareto_figure(shown)
        assert figure is not None, path
        figure.savefig(kinds.ROOT / "docs" / path, metadata={"Source": content_key(shown)})


if __name__ == "__main__":
    main()
