"""Draw the pictures of README.md and the pages from the JSON of what they show.

PYTHONPATH=$PWD python docs/make_pictures.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import table_kinds as kinds
from make_tables import MAIN

from lifelong_moe.reports.figures.comparison import FORGETTING, GAP, pareto_figure
from lifelong_moe.reports.figures.drawing import LINE_COLOURS, canvas, entitle
from lifelong_moe.storage.keys import content_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


SECONDS = {"training": "training", "evaluation": "evaluation", "records": "records in MLflow"}
KILOBYTES = {
    "record bytes": "config.json",
    "evaluation bytes": "its evaluation",
    "logged bytes": "notes of what MLflow has",
}


def long_life() -> dict[str, object]:
    """What each stage of a long run takes and leaves."""
    found = kinds.read("results/long_life50")["checkouts"]["now"]["stages"]
    return {name: [stage[name] for stage in found] for name in (*SECONDS, *KILOBYTES)}


def long_life_figure(curves: Mapping[str, list[float]]) -> Figure:
    """Two panels over the stages: processor seconds, and kilobytes of files that grow."""
    figure, panels = canvas(9.0, 3.4, 1, 2)
    for axes, names, unit, scale in zip(
        panels, (SECONDS, KILOBYTES), ("processor seconds", "kB"), (1.0, 1e-3), strict=True
    ):
        for colour, (name, words) in zip(LINE_COLOURS, names.items(), strict=False):
            values = [scale * one for one in curves[name]]
            axes.plot(range(1, len(values) + 1), values, color=colour)
            # Beside its end, as a legend would lie over the curves.
            axes.annotate(words, (len(values), values[-1]), xytext=(4, 0), textcoords="offset points", fontsize=8,
                          color=colour, va="center", annotation_clip=False)  # fmt: skip
        axes.set(xlabel="stage", ylabel=f"{unit} a stage", ylim=(0, None))
        axes.margins(x=0.02)
    stages = len(curves["training"])
    note = "each stage has a distribution of its own, and all are measured after each; a tiny model"
    entitle(figure, f"{stages} stages, {stages} distributions", "what a stage takes and leaves", note)
    return figure


STARTS = {"first": "first", "5 % more": "5 % more text", "one changed file": "one changed file", "second": "second"}


def reading() -> dict[str, object]:
    """What starts of `prepare` take for text of several sizes."""
    sizes = kinds.read("results/reading")["sizes"]
    kept = ("processor_seconds", "most_private_megabytes")
    return {
        name: {
            "megabytes": [one["megabytes"] for one in sizes if name in one["starts"]],
            **{what: [one["starts"][name][what] for one in sizes if name in one["starts"]] for what in kept},
        }
        for name in STARTS
    }


def reading_figure(shown: Mapping[str, Any]) -> Figure:
    """Two panels over the size of the text: processor seconds, and the most private memory."""
    figure, panels = canvas(9.0, 3.4, 1, 2)
    labels = {"processor_seconds": "processor seconds", "most_private_megabytes": "most private memory, MB"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        for colour, (name, words) in zip(LINE_COLOURS, STARTS.items(), strict=False):
            sizes, values = shown[name]["megabytes"], shown[name][what]
            axes.plot(sizes, values, "o-", color=colour)
            axes.annotate(words, (sizes[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                          fontsize=8, color=colour, va="center", annotation_clip=False)  # fmt: skip
        axes.set(xlabel="MB of JSONL", ylabel=label, ylim=(0, None))
    entitle(figure, "prepare", "what starts take by the size of the text", "processes that each start anew")
    return figure


def pictures() -> dict[str, dict[str, object]]:
    """What each picture shows, by its path below ``docs/``."""
    readme = {name: words.replace("**", "").replace("`", "") for name, (words, _) in MAIN.items()}
    bench = {arm["name"]: arm["name"] for arm in kinds.read("results/bench")["arms"]}
    return {
        "results/trained_base.png": in_bits("results/trained_base", readme),
        "results/pareto.png": in_bits("results/bench", bench),
        "results/long_life50.png": long_life(),
        "results/reading.png": reading(),
    }


DRAWN = {"results/long_life50.png": long_life_figure, "results/reading.png": reading_figure}


def main() -> None:
    """Draw each picture beside its JSON; it keeps the key of what it shows, by which a test knows whether it is old."""
    for path, shown in pictures().items():
        draw: Callable[[Any], Figure | None] = DRAWN.get(path, pareto_figure)
        figure = draw(shown)
        assert figure is not None, path
        figure.savefig(kinds.ROOT / "docs" / path, metadata={"Source": content_key(shown)})


if __name__ == "__main__":
    main()
