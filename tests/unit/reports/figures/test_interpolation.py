"""The figure of a stage's way: its lines, and which point of each is the best."""

from __future__ import annotations

import io

import numpy as np

from lifelong_moe.reports.figures.interpolation import interpolation_figure


def test_each_line_is_the_rise_from_its_better_end() -> None:
    losses = {"old": [2.0, 1.75, 2.5], "new": [4.0, 3.25, 3.0]}
    figure = interpolation_figure("r", (0.0, 0.5, 1.0), losses, ["new"], "second")
    figure.savefig(io.BytesIO(), format="png")  # layout problems show as warnings only when drawn
    (axes,) = figure.axes
    old, best_of_old, new, best_of_new, zero = axes.lines
    assert np.asarray(old.get_ydata()).tolist() == [0.0, -0.25, 0.5] and old.get_linestyle() == "-"
    assert np.asarray(new.get_ydata()).tolist() == [1.0, 0.25, 0.0] and new.get_linestyle() == "--"
    assert np.ravel(best_of_old.get_xdata()).tolist() == [0.5] and np.ravel(best_of_new.get_xdata()).tolist() == [1.0]
    assert set(np.ravel(zero.get_ydata()).tolist()) == {0.0} and "second" in axes.get_xlabel()
    assert figure.get_suptitle().startswith(
        "r: with 50 % of what second learned the mean loss is lowest, 2.50 bits per byte"
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["old", "new (learned here)"]
