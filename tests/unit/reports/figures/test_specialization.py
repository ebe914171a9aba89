"""Figures of specialization: what is written in them, not how they look."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lifelong_moe.reports.figures.specialization import (
    coactivation_figure,
    information_figure,
    inspection_figures,
    leak_figure,
    saturation_figure,
    similarity_figure,
)

BIRTHS = [["old", "old", "new"], ["old", "old"]]


def draw(figure: Figure) -> None:
    """Layout and glyph problems show as warnings (errors here) only when drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def images(figure: Figure) -> list[np.ndarray]:
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes if axes.images]


def test_information_draws_measured_values_over_the_null() -> None:
    values = [{"nats": 0.5, "null_mean": 0.1, "null_95": 0.2}, {"nats": 0.7, "null_mean": 0.1, "null_95": 0.3}]
    figure = information_figure("r", {"token id": values, "distribution": values[:1]})
    draw(figure)
    first, second = figure.axes
    assert (first.get_xlabel(), first.get_ylabel()) == ("layer", "mutual information (nats)")
    assert [np.asarray(line.get_ydata()).tolist() for line in first.lines] == [[0.5, 0.7], [0.1, 0.1], [0.2, 0.3]]
    assert second.get_title() == "expert and distribution" and first.get_ylim()[0] == 0.0


def test_layers_of_different_size_have_a_panel_each() -> None:
    matrices: list[Any] = [[[None, 0.5, 0.5], [1.0, None, 0.0], [None] * 3], [[None, 0.25], [0.25, None]]]
    figure = coactivation_figure("r", matrices, BIRTHS)
    draw(figure)
    shown = images(figure)
    assert [image.shape for image in shown] == [(3, 3), (2, 2)]
    assert np.isnan(shown[0][2]).all() and shown[0][1, 0] == 1.0
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0.0, 1.0)] * 2
    # Only the first layer grew: one line each way, before expert 2.
    assert [[float(np.ravel(line.get_xdata())[0]) for line in axes.lines] for axes in figure.axes[:2]] == [[1.5, 0], []]
    assert "old | new" in figure.get_suptitle()


def test_similarity_has_zero_in_the_middle() -> None:
    figure = similarity_figure("r", [[[1.0, -0.5], [-0.5, 1.0]]], [["old", "new"]])
    draw(figure)
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "-0.50", "-0.50", "1.00"]


def test_saturation_ends_at_one() -> None:
    figure = saturation_figure(
        "r", {"a": {"x": [0.5, 0.25], "y": [0.0, 0.5]}, "b": {"x": [0.75, 0.5], "y": [1, 1]}}, "c"
    )
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == ["x", "y"]
    assert [np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines] == [[0.5, 0.75, 1], [0.25, 0.5, 1]]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["a", "b", "c"]


def test_leak_is_written_in_percent() -> None:
    figure = leak_figure("r", {"english": [0.25, 0.5], "python": [0.0, 0.0]})
    draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["25", "50", "0", "0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["english", "python"]


@pytest.mark.parametrize("saturation", [{}, {"old": {"x": [0.5]}}])
def test_only_what_there_is_gets_a_figure(saturation: dict[str, Any]) -> None:
    layer = {
        "experts": ["old/L0/E0", "new/L0/E1"],
        "token": {"nats": 0.5, "null_mean": 0.1, "null_95": 0.2},
        "distribution": None,
        "leak": {"x": 0.0},
        "coactivation": [[None, 1.0], [1.0, None]],
        "similarity": [[1.0, 0.0], [0.0, 1.0]],
    }
    figures = inspection_figures({"run": "r", "tokens": {"x": 9}, "layers": [layer], "saturation": saturation}, "new")
    assert set(figures) == {"information", "coactivation", "similarity", "leak"} | set(saturation and ["saturation"])
    assert len(figures["information"].axes) == 1
    # One expert a token is never chosen together with another, and one generation has nothing younger to leak to.
    alone = layer | {"experts": ["old/L0/E0", "old/L0/E1"], "coactivation": [[None, 0.0], [None, None]]}
    figures = inspection_figures({"run": "r", "tokens": {"x": 9}, "layers": [alone], "saturation": saturation}, "new")
    assert set(figures) == {"information", "similarity"} | set(saturation and ["saturation"])


def test_many_layers_and_experts_draw() -> None:
    draw(similarity_figure("r", [np.eye(40).tolist()] * 9, [["s"] * 40] * 9))
    draw(coactivation_figure("r", [[[None]]], [["s"]]))
