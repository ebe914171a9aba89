"""Figures of a comparison: what is written in them, and that many arms stay legible."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lifelong_moe.reports.comparison import ArmResult, build_comparison
from lifelong_moe.reports.figures.comparison import (
    comparison_figures,
    curves_figure,
    leak_figure,
    pareto_figure,
)

NAMES = ["docs", "code", "mail"]


def report(forgets: float, lags: float, flops: float, leak: float = 0.25) -> dict[str, Any]:
    """``forgets`` nats a stage, ``lags`` nats above 2 when learned; what is not learned yet costs 8."""
    matrix = [[2 + lags * (j > 0) + forgets * (i - j) if i >= j else 8.0 for j in range(3)] for i in range(3)]
    return made(matrix, [[name] for name in NAMES], flops, leak)


def made(matrix: list[list[float]], learns: list[list[str]], flops: float = 1.0, leak: float = 0.25) -> dict[str, Any]:
    after = {name: max(i for i, of in enumerate(learns) if name in of) for of in learns for name in of}
    cost = {"tokens": 1, "active_flops": flops, "parameters_total": 1, "parameters_active": 1, "epochs": 1.0}
    return {
        "distributions": NAMES,
        "loss_nats_per_token": matrix,
        "bits_per_byte": matrix,
        "forgetting": {n: matrix[-1][NAMES.index(n)] - matrix[i][NAMES.index(n)] for n, i in after.items()},
        "routing": {name: {"leak": leak} for name in NAMES},
        "from_scratch": {},
        "stages": [
            {"name": of[0], "data": of[0], "learns": of, "seconds": 1.0, "experts_per_layer": 2 + i, **cost}
            for i, of in enumerate(learns)
        ],
    }


def comparison(arms: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    methods = {"naive": "sequential", "joint": "joint"}
    results = [
        ArmResult(name, methods.get(name, "lifelong"), (), {seed: f"{name}.s{seed}" for seed in (0, 1)}, reports, {})
        for name, reports in arms.items()
    ]
    return {"compare": "c", **build_comparison(results, reference=results[0].name)}


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    """Naive forgets 0.1 a stage; better forgets 0.01 and lags 0.05; worse does both; joint has one stage."""
    return comparison(
        {
            "naive": {0: report(0.1, 0.0, 100.0), 1: report(0.12, 0.0, 100.0)},
            "better": {0: report(0.01, 0.05, 200.0, leak=0.75)},
            "worse": {0: report(0.05, 0.08, 50.0)},
            "joint": {0: made([[2.1, 2.1, 2.1]], [NAMES])},
            "absent": {},
        }
    )


def draw(figure: Figure) -> None:
    """Layout and glyph problems show as warnings (errors here) only when drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_pareto(few: dict[str, Any]) -> None:
    figure = pareto_figure(few)
    assert figure is not None
    (axes,) = figure.axes
    dots = [collection for collection in axes.collections if isinstance(collection, PathCollection)]
    found = np.array([dot.get_offsets()[0] for dot in dots])
    assert found == pytest.approx(np.array([[(0.2 + 0.24) / 2, 0.02, 0.1], [0.0, 0.05, 0.08]]).T)
    areas = [dot.get_sizes()[0] for dot in dots]
    assert areas == pytest.approx([areas[1] / 2, areas[1], areas[1] / 4])
    assert sorted(text.get_text() for text in axes.texts) == ["better", "naive", "worse"]
    front = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert front.get_xdata() == pytest.approx([0.02, 0.22])  # "worse" is beaten in both
    draw(figure)


def test_of_equal_forgetting_the_title_names_what_learned_best() -> None:
    arms = {
        "naive": {0: report(0.1, 0.0, 1.0)},
        "one": {0: report(0.01, 0.08, 1.0)},
        "two": {0: report(0.012, 0.05, 1.0)},
    }
    figure = pareto_figure(comparison(arms))
    said = "c: two forgets as little as any, +0.02 bits per byte, at a plasticity gap of +0.05"
    assert figure is not None and figure.get_suptitle().startswith(said)


def test_curves_begin_where_the_distribution_is_learned(few: dict[str, Any]) -> None:
    figure = curves_figure(few)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == NAMES
    mail = figure.axes[2]
    assert mail.get_ylim()[1] < 3 < 8  # 8 nats before it was learned lie outside of the frame
    assert len(mail.lines) == 4 and mail.lines[3].get_linestyle() == ":"  # joint: a level, not a curve
    assert [tick.get_text() for tick in mail.get_xticklabels()] == NAMES
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["naive", "better", "worse", "joint"]
    draw(figure)


def test_leak(few: dict[str, Any]) -> None:
    figure = leak_figure(few)
    assert figure is not None
    image = figure.axes[0].images[0].get_array()
    assert image is not None and image.shape == (4, 3)
    assert image[1].tolist() == [0.75, 0.75, None]  # no experts came after mail
    assert [text.get_text() for text in figure.axes[0].texts][3:6] == ["75.0", "75.0", "–"]
    draw(figure)


def test_what_is_not_known_is_not_drawn() -> None:
    assert comparison_figures(comparison({"lifelong": {}})) == {}
    alone = comparison({"lifelong": {0: report(0.1, 0.1, 1.0)}})  # no unrestrained arm, hence no plasticity gap
    assert set(comparison_figures(alone)) == {"curves.png", "leak.png"}


def test_names_of_twenty_arms_do_not_overlap() -> None:
    random = np.random.default_rng(0)
    arms = {"naive": {0: report(0.1, 0.0, 1.0)}} | {
        f"size.experts-{i}.top_k-{i % 2}": {0: report(*random.uniform(0.01, 0.06, 2), random.uniform(1, 2))}
        for i in range(19)
    }
    figures = comparison_figures(comparison(arms))
    for figure in figures.values():
        draw(figure)
    (axes,) = figures["pareto.png"].axes
    renderer = figures["pareto.png"].canvas.get_renderer()  # type: ignore[attr-defined]
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == 20
    assert sum(box.count_overlaps(boxes) - 1 for box in boxes) <= 2  # crowds leave no room for the last one or two
