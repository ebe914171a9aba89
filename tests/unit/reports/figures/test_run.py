"""Figures: what is written in them, not how they look."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from lifelong_moe.reports.figures.run import curves_figure, expert_load_figure, loss_matrix_figure

NAMES = ["english_docs", "python_code", "cpp_headers"]
MATRIX = np.array([[2.1, 3.0, 3.4], [2.2, 1.9, 2.8], [2.15, 1.95, np.nan]])
INIT = np.array([8.1, 8.0, 8.2])


def draw(figure: Figure) -> None:
    """Layout and glyph problems show as warnings (errors here) only when drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")  # another test may have imported it
    assert pyplot is None or not pyplot.get_fignums()


def cells(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def outlines(figure: Figure) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]


def test_loss_matrix_shows_values_changes_and_outlines() -> None:
    figure = loss_matrix_figure("r", MATRIX, NAMES, NAMES)
    draw(figure)
    assert cells(figure) == [
        *["2.100", "3.000", "3.400"],
        *["2.200\n(+0.100)", "1.900", "2.800"],
        *["2.150\n(+0.050)", "1.950\n(+0.050)", "–"],
    ]
    assert outlines(figure) == [(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)]
    assert figure.get_suptitle().startswith("r: worst old text python_code +0.05 bits per byte\n")


def test_loss_matrix_colours_compare_within_a_column() -> None:
    image = loss_matrix_figure("r", MATRIX, NAMES, NAMES, init=INIT).axes[0].images[0].get_array()
    assert image is not None
    # Column 0 spans less than a tenth of its best value, so it is coloured over 2.1 … 2.31.
    np.testing.assert_allclose(image[:, 0], [1.0, 0.0, 0.1 / 0.21, 0.05 / 0.21], atol=1e-12)
    # Column 1: the untrained model's value does not count, and is clipped.
    np.testing.assert_allclose(image[:, 1], [1.0, 1.0, 0.0, 0.05 / 1.1], atol=1e-12)


def test_learned_after_says_which_stage_trained_a_column() -> None:
    figure = loss_matrix_figure("r", MATRIX, ["s0", "s1", "s2"], NAMES, learned_after=[2, 1])
    draw(figure)
    assert outlines(figure) == [(-0.5, 1.5), (0.5, 0.5)]


def test_curves_have_a_line_per_distribution_and_mark_its_stage() -> None:
    figure = curves_figure("r", MATRIX, NAMES, NAMES, init=INIT)
    draw(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["init", *NAMES]
    large = [line for line in axes.lines if line.get_markersize() == 12]
    assert [float(np.ravel(line.get_xdata())[0]) for line in large] == [1.0, 2.0, 3.0]
    low, high = axes.get_ylim()
    assert 1.0 < low < 1.9 and 3.4 < high < 8.0  # the stages fill the frame, the untrained model does not
    assert "beyond the frame" in figure.get_suptitle()


def test_expert_load_is_a_share_of_each_layer() -> None:
    births = ["english_docs"] * 2 + ["python_code"]
    counts = {"english_docs": np.array([[3, 1, 0], [0, 0, 0]]), "python_code": np.array([[1, 1, 2], [0, 5, 5]])}
    figure = expert_load_figure("r", counts, births)
    draw(figure)
    assert cells(figure) == ["75", "25", "0", "–", "–", "–", "25", "25", "50", "0", "50", "50"]
    axes = figure.axes[0]
    names = {label.get_text(): label.get_position()[1] for label in axes.get_yticklabels()}
    assert names == {"english_docs": 0.5, "python_code": 2.5}  # each beside its two layers
    across, down = (line for line in axes.lines)
    assert (np.ravel(across.get_xdata())[0], np.ravel(down.get_ydata())[0]) == (1.5, 1.5)


def test_many_columns_have_no_numbers() -> None:
    names = [f"d{i}" for i in range(23)]
    assert len(cells(loss_matrix_figure("r", np.ones((2, 22)), names[:2], names[:22]))) == 44
    assert not cells(loss_matrix_figure("r", np.ones((2, 23)), names[:2], names))


def test_large_and_degenerate_inputs_draw() -> None:
    stages = [f"a_long_stage_name_{i}" for i in range(9)]
    draw(loss_matrix_figure("r", np.ones((9, 9)), stages, stages))
    draw(curves_figure("r", np.full((1, 1), np.nan), ["a"], ["a"]))
    draw(expert_load_figure("r", {"a": np.ones((2, 96), dtype=np.int64)}, ["s"] * 96))
    draw(expert_load_figure("r", {"a": np.zeros((1, 1), dtype=np.int64)}, ["s"]))


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 stages, 3 distributions"):
        loss_matrix_figure("r", MATRIX, NAMES[:2], NAMES)
    with pytest.raises(ValueError, match="init must be"):
        curves_figure("r", MATRIX, NAMES, NAMES, init=INIT[:2])
    with pytest.raises(ValueError, match="at least one distribution"):
        expert_load_figure("r", {}, NAMES)
    with pytest.raises(ValueError, match=r"counts\['a'\] must be \(layers, 3\)"):
        expert_load_figure("r", {"a": np.ones((2, 4))}, NAMES)
